"""L1: the forward pass equals the plain layer run with the result of ``rewrite``."""

from __future__ import annotations

import pytest
import torch
from cells import Cell
from subject import Subject, assert_close, exact_input, written

from inlay.testing.laws import forward


@pytest.mark.every_pair
def test_forward_is_the_layer_with_rewritten_weights(cell: Cell) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    forward.forward_is_the_layer_with_rewritten_weights(cell)


def test_two_methods_on_one_layer(cell: Cell) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    forward.two_methods_on_one_layer(cell)


def test_scaling_on_the_layer_reaches_both_sides(cell: Cell) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    subject = Subject(cell)
    scaled = [layer for layer in subject.state.layers() if "scaling" in layer.entries["one"][0].options]
    before = subject.model(subject.x).detach()
    for layer in scaled:
        layer.scaling["one"] *= 0.5
    after = subject.model(subject.x)
    expected = written(subject.exact())(exact_input(subject.x))
    assert_close(after, expected, cell.dtype, size=float(before.abs().max()))
    if not cell.renormalises:
        assert bool(scaled) == (not torch.equal(before, after))


def test_adapters_change_the_output(cell: Cell) -> None:
    """Not a law, but what makes the laws mean something: random adapters move outputs, most by a tenth or more."""
    subject = Subject(cell)
    base = subject.base_output().double()
    moved = (subject.model(subject.x).detach().double() - base).abs().max() / base.abs().max()
    assert 0.02 < float(moved) < 100  # a sanity check; C3A on a bank of transposed experts was seen at 0.0298
