"""L5: deepcopy and pickle give an equal model with a state of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from cells import Cell
from subject import Subject, assert_bitwise, tensors_of

from inlay.core.active import set_active
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge, unmerge
from inlay.core.state import find_state
from inlay.testing.laws import keeping
from inlay.testing.laws.keeping import COPIES


@pytest.mark.parametrize("way", COPIES)
def test_copy_is_equal_and_independent(cell: Cell, way: str) -> None:
    keeping.copy_is_equal_and_independent(cell, way)


@pytest.mark.parametrize("way", COPIES)
def test_copy_of_a_merged_model_unmerges_exactly(cell: Cell, way: str) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    subject = Subject(cell)
    before = tensors_of(subject.model)
    merge(subject.state)
    twin = COPIES[way](subject.model)
    own = find_state(twin)
    assert own is not None
    assert torch.equal(twin(subject.x), subject.model(subject.x))
    assert unmerge(own)
    assert_bitwise(tensors_of(twin), before)
    assert all(layer.merged for layer in subject.state.layers())


def test_copy_of_one_layer_splits_off(cell: Cell) -> None:
    subject = Subject(cell)
    layer = subject.model.last
    twin = copy.deepcopy(layer)
    assert isinstance(twin, AdaptedLayer)
    assert any(one is twin for one in twin.state.layers())
    assert torch.equal(subject.model.call(twin, subject.x), subject.model.call(layer, subject.x))
    set_active(twin.state, [])
    assert subject.state.active == ("one",)
