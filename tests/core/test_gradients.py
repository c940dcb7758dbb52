"""Where gradients are switched is remembered, and looked up again once anything is elsewhere."""

from __future__ import annotations

import copy
import gc
import weakref

import torch
from torch import nn

import inlay
from inlay.compat.layers.constructed import attach
from inlay.methods.lora import LoRA


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)


def config(*targets: str) -> inlay.LoraConfig:
    return inlay.LoraConfig(r=2, target_modules=list(targets or ("q", "v")))


def switched() -> tuple[inlay.PeftModel, Pair]:
    """A model with two adapters, between which it was switched both ways."""
    base = Pair()
    model = inlay.get_peft_model(base, config(), "a")
    model.add_adapter("b", config())
    for name in ("b", "a"):
        model.set_adapter(name)
    return model, base


def flags(model: nn.Module, adapter: str) -> set[bool]:
    return {p.requires_grad for name, p in model.named_parameters() if f".{adapter}." in name}


def check(model: inlay.PeftModel) -> None:
    for on, off in (("b", "a"), ("a", "b")):
        model.set_adapter(on)
        assert flags(model, on) == {True}
        assert flags(model, off) == {False}


def test_a_parameter_that_was_replaced_is_switched() -> None:
    model, base = switched()
    base.q.lora_A["b"].weight = nn.Parameter(torch.ones(2, 4), requires_grad=False)
    check(model)


def test_a_module_that_was_replaced_is_switched() -> None:
    model, base = switched()
    base.q.lora_A["b"] = nn.Linear(4, 2, bias=False).requires_grad_(False)
    check(model)


def test_a_container_that_was_replaced_is_switched() -> None:
    model, base = switched()
    base.v.lora_B = nn.ModuleDict({name: nn.Linear(2, 4, bias=False) for name in ("a", "b")})
    check(model)


def test_layers_that_come_and_go_are_switched() -> None:
    model, base = switched()
    model.add_adapter("c", config("v"))
    base.q.delete_adapter("b")
    check(model)
    model.set_adapter("c")
    assert flags(model, "c") == {True}
    assert flags(model, "a") == flags(model, "b") == {False}


def test_an_adapter_that_comes_to_a_further_layer_is_switched_there() -> None:
    model, base = switched()
    model.add_adapter("c", config("q"))
    for name in ("c", "a"):
        model.set_adapter(name)
    attach(base.v, "c", LoRA(config("v")), beside=True)
    assert any(".v." in name and ".c." in name for name, _ in model.named_parameters())
    for name in ("c", "a"):
        model.set_adapter(name)
        assert flags(model, "c") == {name == "c"}


def test_copies_switch_their_own() -> None:
    model, _ = switched()
    other = copy.deepcopy(model)
    other.set_adapter("b")
    assert flags(model, "a") == flags(other, "b") == {True}
    assert flags(model, "b") == flags(other, "a") == {False}
    check(other)
    check(model)


def test_an_adapter_with_a_name_from_before_is_switched() -> None:
    model, _ = switched()
    model.delete_adapter("b")
    model.add_adapter("b", config())
    check(model)


def test_nothing_that_was_deleted_is_kept() -> None:
    _model, base = switched()
    gone = weakref.ref(base.q.lora_A["b"].weight)
    base.q.delete_adapter("b")
    gc.collect()
    assert gone() is None
