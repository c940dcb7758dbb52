"""L3: merging and unmerging gives back the original, bitwise; merging changes no output, and happens all or not."""

from __future__ import annotations

from typing import Any

import cells
import pytest
import torch
from cells import Cell
from subject import Subject, assert_bitwise, assert_close, exact_input, tensors_of, written

from inlay.core.active import set_active
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge, unmerge
from inlay.errors import MergeError
from inlay.testing.laws import keeping


@pytest.fixture
def subject(cell: Cell) -> Subject:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    return Subject(cell)


def exact_outputs(subject: Subject, *names: str) -> torch.Tensor:
    """The output of the plain float64 model with the named adapters written into it."""
    set_active(subject.state, names)
    return written(subject.exact())(exact_input(subject.x)).detach()


def test_merge_then_unmerge_is_the_original(cell: Cell) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    keeping.merge_then_unmerge_is_the_original(cell)


def test_merged_and_switched_off_is_the_base(cell: Cell) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    keeping.merged_and_switched_off_is_the_base(cell)


def test_merge_twice_adds_nothing(cell: Cell, subject: Subject) -> None:
    merge(subject.state)
    once = tensors_of(subject.model)
    assert merge(subject.state) == []
    assert_bitwise(tensors_of(subject.model), once)


@pytest.mark.parametrize("keep", ["copy", "none"])
def test_partial_merge(cell: Cell, subject: Subject, keep: str) -> None:
    """One of two active adapters is merged, the other stays above it; then the other is merged too."""
    subject.add("two")
    subject.activate("one", "two")
    before = tensors_of(subject.model)
    expected = exact_outputs(subject, "one", "two")
    if keep == "none" and not cells.additive(subject.cell.companion):
        with pytest.raises(MergeError, match="reads the untouched weight"):
            merge(subject.state, ["one"], keep=keep)
        assert_bitwise(tensors_of(subject.model), before)
        return
    merge(subject.state, ["one"], keep=keep)
    assert_close(subject.model(subject.x), expected, cell.dtype, "first merged", ulps=32, size=subject.largest())
    merge(subject.state, ["two"], keep=keep)
    assert_close(subject.model(subject.x), expected, cell.dtype, "both merged", ulps=48, size=subject.largest())
    if keep == "copy":
        unmerge(subject.state)
        assert_bitwise(tensors_of(subject.model), before)


def test_failing_merge_leaves_every_weight(cell: Cell, subject: Subject) -> None:
    """One infinite value in an adapter of the last layer: no layer may change."""
    layer = [layer for layer in subject.state.layers() if isinstance(layer, AdaptedLayer)][-1]
    entry = layer.entries["one"][-1]
    values, slots = layer.params(entry), entry.method.slots(layer.site)
    role = next((role for role, slot in slots.items() if slot.trainable), None) or entry.shared[0][0]
    with torch.no_grad():
        getattr(values, role).view(-1)[0] = torch.inf
    for keep in ("copy", "none"):
        before = tensors_of(subject.model)
        with pytest.raises(MergeError, match="not finite"):
            merge(subject.state, keep=keep)
        assert_bitwise(tensors_of(subject.model), before)
        assert not any(layer.merged for layer in subject.state.layers())


def test_failing_write_undoes_this_merge_and_no_earlier_one(
    cell: Cell, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject.add("two")
    subject.activate("one", "two")
    original = tensors_of(subject.model)
    merge(subject.state, ["one"])
    before = tensors_of(subject.model)
    layer = [layer for layer in subject.state.layers() if isinstance(layer, AdaptedLayer)][-1]
    write, failures = AdaptedLayer.write, [OSError("disk full")]

    def failing(self: AdaptedLayer, *arguments: Any) -> None:
        write(self, *arguments)
        if self is layer and failures:
            raise failures.pop()

    monkeypatch.setattr(AdaptedLayer, "write", failing)
    with pytest.raises(OSError, match="disk full"):
        merge(subject.state, ["two"])
    assert_bitwise(tensors_of(subject.model), before)
    assert all(layer.merged_adapters == ["one"] for layer in subject.state.layers())
    assert unmerge(subject.state)
    assert_bitwise(tensors_of(subject.model), original)
