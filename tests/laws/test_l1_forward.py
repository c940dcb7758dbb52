"""L1: the forward pass equals the plain layer run with the result of ``rewrite``."""

from __future__ import annotations

import copy

import pytest
import torch
from cells import Cell
from subject import Subject, assert_close, written


@pytest.mark.every_pair
def test_forward_is_the_layer_with_rewritten_weights(cell: Cell) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    subject = Subject(cell)
    expected = written(subject.exact())(exact(subject.x))
    assert_close(subject.model(subject.x), expected, cell.dtype, size=float(subject.base_output().abs().max()))


def test_two_methods_on_one_layer(cell: Cell) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    subject = Subject(cell)
    subject.add("two")
    size = float(subject.base_output().abs().max())
    for names in (("one", "two"), ("two", "one")):
        subject.activate(*names)
        expected = written(subject.exact())(exact(subject.x))
        assert_close(subject.model(subject.x), expected, cell.dtype, str(names), size=size)


def test_scaling_on_the_layer_reaches_both_sides(cell: Cell) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    subject = Subject(cell)
    scaled = [layer for layer in subject.state.layers() if "scaling" in layer.entries["one"][0].options]
    before = subject.model(subject.x).detach()
    for layer in scaled:
        layer.scaling["one"] *= 0.5
    after = subject.model(subject.x)
    expected = written(subject.exact())(exact(subject.x))
    assert_close(after, expected, cell.dtype, size=float(before.abs().max()))
    if "max_norm" not in cell.kind:  # whose lookups write to the table
        assert bool(scaled) == (not torch.equal(before, after))


def test_adapters_change_the_output(cell: Cell) -> None:
    """Not a law, but what makes the laws mean something: random adapters move outputs by a tenth or more."""
    subject = Subject(cell)
    base = subject.base_output().double()
    moved = (subject.model(subject.x).detach().double() - base).abs().max() / base.abs().max()
    assert 0.03 < float(moved) < 100


def exact(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else copy.copy(x)
