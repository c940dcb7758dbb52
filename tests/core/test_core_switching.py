"""Any sequence of switching, merging and unmerging ends where a fresh model brought to the same point would be."""

from __future__ import annotations

import pytest
import torch
from core_models import adapted, net, tokens
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from inlay.core.active import set_active, switched_back
from inlay.core.call import opened
from inlay.core.eject import eject
from inlay.core.merge import merge, unmerge
from inlay.errors import UnknownAdapterError


class Switching(RuleBasedStateMachine):
    """Any sequence of operations leaves the model with the output of a fresh model brought to the same point."""

    @initialize()
    def start(self) -> None:
        self.model, self.state = adapted("a", "b")
        self.active: tuple[str, ...] = ("a",)
        self.layer_off = False
        self.merged: tuple[str, ...] = ()
        self.base = net().state_dict()

    @rule(names=st.lists(st.sampled_from(["a", "b"]), unique=True))
    def activate(self, names: list[str]) -> None:
        set_active(self.state, names)
        self.active, self.layer_off = tuple(names), False

    @rule()
    def switch_one_layer_off(self) -> None:
        self.model.layers[0].q.override(enabled=False)
        self.layer_off = True

    @precondition(lambda self: not self.layer_off)
    @rule(name=st.sampled_from(["a", "b"]))
    def merge_one(self, name: str) -> None:
        merge(self.state, [name])
        if name not in self.merged:
            self.merged += (name,)

    @rule()
    def unmerge(self) -> None:
        assert unmerge(self.state) == bool(self.merged)
        self.merged = ()

    @rule(disabled=st.booleans())
    def compare(self, disabled: bool) -> None:
        fresh, state = adapted("a", "b")
        set_active(state, [*self.merged, *(name for name in self.active if name not in self.merged)])
        if self.layer_off:
            fresh.layers[0].q.override(enabled=False)
        with opened(self.state, disabled=disabled), opened(state, disabled=disabled):
            assert torch.allclose(self.model(tokens()), fresh(tokens()), atol=1e-4)

    def teardown(self) -> None:
        if hasattr(self, "model"):
            eject(self.model, self.state)
            assert all(torch.equal(tensor, self.base[key]) for key, tensor in self.model.state_dict().items())


TestSwitching = Switching.TestCase
TestSwitching.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)


def test_a_failed_switch_leaves_what_each_layer_had():
    """Also the active adapters and switches that single layers were given."""
    model, state = adapted("a", "b")
    layer = model.layers[0].q
    layer.set_adapter("b")

    def fail() -> None:
        with switched_back(state):
            set_active(state, ["b"])
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert state.active == ("a",)
    layers = list(state.layers())
    assert [one.active for one in layers] == [("b",) if one is layer else ("a",) for one in layers]


def test_one_layer_cannot_be_given_an_unknown_adapter():
    model, _ = adapted("a", "b")
    layer = model.layers[0].q
    with pytest.raises(UnknownAdapterError, match="there are: 'a', 'b'"):
        layer.set_adapter("typo")
    assert layer.active == ("a",)
