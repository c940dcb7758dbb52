"""State: which adapters act, in which order, for the model and for one layer; cached chains never go stale."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref

import pytest
import torch
from core_models import CONFIGS, adapted, anatomy, net, tokens

from inlay.core.active import set_active, set_trainable
from inlay.core.call import opened
from inlay.core.eject import delete, eject
from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.state import find_state
from inlay.errors import AdapterNameError, MergeError, StateError, UnknownAdapterError
from inlay.methods.lora import LoraConfig


def test_first_adapter_is_active_and_later_ones_are_not() -> None:
    model, state = adapted("a", "b")
    assert state.active == ("a",)
    assert [p.requires_grad for n, p in model.named_parameters() if ".a." in n] == [True] * 8
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_order_of_activation_is_the_order_of_the_chain() -> None:
    """A rotation and an update do not commute, so the order must show, and both orders must be what they say."""
    model, state = adapted("a", "turn")
    layer = model.layers[0].q
    outputs = {}
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    weight, bias = layer.base_layer.weight.detach(), layer.base_layer.bias.detach()
    delta = (layer.lora_B["a"].weight @ layer.lora_A["a"].weight * layer.scaling["a"]).detach()
    set_active(state, ["turn"])
    eye = torch.eye(6)
    turned = (layer(eye) - bias).detach().T  # the rotated weight
    rotation = torch.linalg.solve(weight, turned)
    for order in (("a", "turn"), ("turn", "a")):
        set_active(state, order)
        outputs[order] = layer(x).detach()
    assert torch.allclose(outputs["turn", "a"], x @ (turned + delta).T + bias, atol=1e-5)
    assert torch.allclose(outputs["a", "turn"], x @ ((weight + delta) @ rotation).T + bias, atol=1e-4)
    assert not torch.allclose(outputs["turn", "a"], outputs["a", "turn"], atol=1e-3)


def test_several_active_add_up() -> None:
    model, state = adapted("a", "b")
    layer, x = model.layers[1].q, torch.randn(2, 6)
    base = layer.base_layer(x)
    parts = {}
    for name in ("a", "b"):
        set_active(state, [name])
        parts[name] = layer(x) - base
    set_active(state, ["a", "b"])
    assert torch.allclose(layer(x), base + parts["a"] + parts["b"], atol=1e-6)
    set_active(state, [])
    assert torch.equal(layer(x), base)


def test_an_adapter_is_active_once_only_and_must_exist() -> None:
    model, state = adapted("a", "b")
    before = anatomy(model)
    with pytest.raises(StateError, match="once"):
        set_active(state, ["a", "a"])
    with pytest.raises(UnknownAdapterError):
        set_active(state, ["a", "nobody"])
    assert anatomy(model) == before


def test_override_of_one_layer_holds_until_the_model_is_set_again() -> None:
    model, state = adapted("a", "b")
    one, other = model.layers[0].q, model.layers[1].q
    x = torch.randn(2, 6)
    one.override(active=("b",))
    assert one.active == ("b",)
    assert other.active == ("a",)
    set_active(state, ["b"])
    expected = one(x)
    set_active(state, ["a"])
    assert not torch.allclose(one(x), expected)
    one.override(active=("b",))
    assert torch.equal(one(x), expected)
    one.override(enabled=False)
    assert torch.equal(one(x), one.base_layer(x))
    assert not torch.equal(other(x), other.base_layer(x))
    set_active(state, ["b"])
    assert one.enabled
    assert torch.equal(one(x), expected)


def test_scaling_written_to_one_layer_is_seen_by_the_next_forward_of_that_layer_only() -> None:
    model, _ = adapted("a")
    one, other = model.layers[0].q, model.layers[1].q
    x = torch.randn(2, 6)
    base, full, beside = one.base_layer(x), one(x), other(x)
    one.scaling["a"] = one.scaling["a"] * 3
    assert torch.allclose(one(x) - base, 3 * (full - base), atol=1e-5)
    assert torch.equal(other(x), beside)
    with pytest.raises(KeyError):
        one.scaling["b"] = 1.0
    with pytest.raises(StateError):
        del one.scaling["a"]


def test_a_forward_resolves_its_chain_once_per_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = adapted("a", "b")
    counted: list[str] = []
    resolve = AdaptedLayer._resolve

    def counting(layer: AdaptedLayer) -> object:
        counted.append(layer.site.name)
        return resolve(layer)

    monkeypatch.setattr(AdaptedLayer, "_resolve", counting)
    model(tokens())
    once = len(counted)
    model(tokens())
    assert len(counted) == once
    set_active(state, ["b"])  # no layer is resolved before it is needed
    assert len(counted) == once
    model(tokens())
    assert len(counted) == 2 * once


def test_switching_costs_nothing_per_layer_and_keeps_tensors() -> None:
    model, state = adapted("a", "b")
    before = anatomy(model)
    for names in itertools.permutations(["a", "b"]):
        set_active(state, names)
        model(tokens())
    set_active(state, ["a"])
    assert anatomy(model) == before


def test_set_trainable_touches_the_named_adapters_only() -> None:
    model, state = adapted("a", "b")
    set_trainable(state, ["a"], False)
    set_trainable(state, ["b"], True)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"b"}
    set_active(state, ["a"], trainable=True)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    with pytest.raises(UnknownAdapterError):
        set_trainable(state, ["c"])


def test_delete_takes_layers_out_that_end_empty_and_refuses_merged() -> None:
    model, state = adapted("a", "b")
    set_active(state, ["a", "b"])
    merge(state, ["a"])
    with pytest.raises(MergeError, match="unmerge"):
        delete(model, state, "a")
    unmerge(state)
    k = model.layers[0].k.base_layer
    delete(model, state, "b")
    assert state.active == ("a",)
    assert model.layers[0].k is k  # only b adapted it
    reference, other = adapted("a")
    assert torch.equal(model(tokens()), reference(tokens()))
    assert list(other.records) == list(state.records)
    delete(model, state, "a")
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())


def test_state_holds_no_layer_alive_and_copies_do_not_meet() -> None:
    model, state = adapted("a")
    gone = weakref.ref(model.layers[0].q)
    del model
    gc.collect()
    assert gone() is None
    assert list(state.layers()) == []


class Whole(torch.nn.Module):
    def __init__(self, left: torch.nn.Module, right: torch.nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) - 2 * self.right(x)


def test_parts_that_share_a_name_cannot_be_joined() -> None:
    whole = Whole(adapted("a")[0], adapted("a")[0])
    before = anatomy(whole)
    with pytest.raises(StateError, match="separately"):
        find_state(whole)
    with pytest.raises(AdapterNameError, match="'a'"):
        inject(plan(whole, CONFIGS["b"](), "new"))
    assert anatomy(whole) == before


def test_injecting_into_the_whole_joins_the_states_of_its_parts() -> None:
    (left, _), (right, _) = adapted("a"), adapted("b")
    whole = Whole(left, right)
    expected = whole(tokens()).detach()
    state = inject(plan(whole, LoraConfig(r=2, target_modules=["left.head"]), "new"))
    assert find_state(whole) is state
    assert list(state.records) == ["a", "b", "new"]
    assert torch.equal(whole(tokens()), expected)
    set_active(state, ["b"])
    assert torch.equal(whole(tokens()), net()(tokens()) - 2 * right(tokens()))
    set_active(state, ["a", "b"])
    merge(state)
    assert torch.allclose(whole(tokens()), expected, atol=1e-5)
    eject(whole, state)
    assert list(whole.state_dict()) == list(Whole(net(), net()).state_dict())
    assert torch.equal(whole(tokens()), Whole(net(), net())(tokens()))
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_merged_order_that_would_change_the_output_is_refused() -> None:
    model, state = adapted("a", "turn")
    set_active(state, ["a", "turn"])
    before = anatomy(model)
    with pytest.raises(MergeError, match="do not commute"):
        merge(state, ["turn"])
    assert anatomy(model) == before
    expected = model(tokens()).detach()
    merge(state, ["a"])
    assert torch.allclose(model(tokens()), expected, atol=1e-5)


def test_calls_of_two_threads_do_not_meet() -> None:
    model, state = adapted("a", "b")
    expected = {}
    for name in ("a", "b"):
        set_active(state, [name])
        expected[name] = model(tokens()).detach()
    start, wrong = threading.Barrier(2), []

    def serve(name: str) -> None:
        start.wait()
        for _ in range(30):
            with opened(state, names=[name] * len(tokens())):
                if not torch.equal(model(tokens()), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
