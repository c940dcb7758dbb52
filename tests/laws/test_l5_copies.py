"""L5: deepcopy and pickle give an equal model with a state of its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from cell_layers import Pair
from cells import Cell
from subject import Subject, assert_bitwise, outcome, tensors_of

from inlay.core.active import adapter_parameters, set_active
from inlay.core.eject import eject
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge, unmerge
from inlay.core.state import find_state

COPIES: dict[str, Callable[[Pair], Pair]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copy_is_equal_and_independent(cell: Cell, way: str) -> None:
    subject = Subject(cell)
    subject.add("two")
    subject.activate("one", "two")
    model, state = subject.model, subject.state
    twin = COPIES[way](model)
    own = find_state(twin)
    assert own is not None
    assert own is not state
    assert own.active == state.active == ("one", "two")
    assert list(own.records) == list(state.records)
    assert {id(t) for t in twin.state_dict(keep_vars=True).values()}.isdisjoint(
        id(t) for t in model.state_dict(keep_vars=True).values()
    )
    before = tensors_of(model)
    assert_bitwise(tensors_of(twin), before)
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    ours, theirs = outcome(model, subject.x), outcome(twin, subject.x)
    assert torch.equal(ours.y, theirs.y)
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert torch.equal(gradient, theirs.gradients[name]), name

    # the copy is trained, switched, merged and emptied; the original does not notice
    before = tensors_of(model)
    with torch.no_grad():
        for parameter in adapter_parameters(own, ["one"]):
            parameter.mul_(0.5)
    set_active(own, ["one"])
    assert state.active == ("one", "two")
    y = subject.model(subject.x).detach()
    if not cell.unmergeable:
        merge(own)
        assert not any(layer.merged for layer in state.layers())
        unmerge(own)
    eject(twin, own)
    assert not any(isinstance(module, AdaptedLayer) for module in twin.modules())
    if "max_norm" not in cell.kind:  # a lookup writes to such a table
        assert_bitwise(tensors_of(model), before)
        assert torch.equal(model(subject.x), y)
    assert find_state(model) is state


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
