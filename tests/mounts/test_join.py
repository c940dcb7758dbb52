"""Injecting into a model whose parts have adapters joins their states, or refuses and changes nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay.core.active import set_active
from inlay.core.call import opened
from inlay.core.eject import delete, eject
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.state import find_state
from inlay.errors import AdapterNameError, StateError
from inlay.methods.lora import LoraConfig
from inlay.methods.vera import VeraConfig

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin(x).tanh())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = Tower()
        self.image = Tower()
        self.top = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.text(x) + self.image(x))


def lora(targets: list[str], **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)


def parts() -> tuple[Model, Model]:
    """A model whose two towers were given adapters separately; the text tower trains its biases too."""
    torch.manual_seed(0)
    model = Model()
    untouched = copy.deepcopy(model)
    inject(plan(model.text, lora(["lin"], bias="lora_only"), "t"))
    inject(plan(model.image, VeraConfig(r=2, target_modules=["lin", "head"]), "i"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.add_(0.5)
    return model, untouched


def test_joining_changes_nothing_that_is_computed() -> None:
    model, untouched = parts()
    before = model(X)
    with pytest.raises(StateError, match=r"'t'; 'i'.*inject into the whole"):
        find_state(model)
    state = inject(plan(model, lora(["top"]), "w"))
    assert find_state(model) is state
    assert list(state.records) == ["t", "i", "w"]
    assert state.active == ("t", "i")  # an adapter that is not the first is not switched on
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    set_active(state, ["w"])
    plain = copy.deepcopy(untouched)
    layer: Any = model.top
    with torch.no_grad():
        plain.top.weight += 4 * layer.lora_B["w"].weight @ layer.lora_A["w"].weight
    torch.testing.assert_close(model(X), plain(X))
    with opened(state, disabled=True):
        torch.testing.assert_close(model(X), untouched(X))


def test_eject_gives_everything_back() -> None:
    model, untouched = parts()
    state = inject(plan(model, lora(["top"]), "w"))
    assert not model.top.base_layer.weight.requires_grad  # type: ignore[union-attr]
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X).sum().backward()
    optimiser.step()
    assert not torch.equal(model.text.lin.base_layer.bias, untouched.text.lin.bias)  # type: ignore[union-attr]
    eject(model, state)
    assert model.state_dict().keys() == untouched.state_dict().keys()
    for name, tensor in untouched.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in model.parameters())


def test_shared_tensors_follow() -> None:
    model, _ = parts()
    assert "image.vera_A.i" in dict(model.named_buffers())
    state = inject(plan(model, lora(["top"]), "w"))
    assert "vera_A.i" in dict(model.named_buffers())
    assert "image.vera_A.i" not in dict(model.named_buffers())
    y = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(X), y)
    inject(plan(model, VeraConfig(r=2, target_modules=["lin"]), "v"))
    delete(model, state, "i")
    assert {name for name, _ in model.named_buffers() if "vera" in name} == {"vera_A.v", "vera_B.v"}


def test_switches_of_a_part_are_kept() -> None:
    model, _ = parts()
    image = find_state(model.image)
    assert image is not None
    image.enabled = False
    image.touch()
    before = model(X)
    inject(plan(model, lora(["top"]), "w"))
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)


def test_merged_parts_stay_merged() -> None:
    model, untouched = parts()
    text = find_state(model.text)
    assert text is not None
    merge(text)
    before = model(X)
    state = inject(plan(model, lora(["top"]), "w"))
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    unmerge(state)
    assert torch.equal(model.text.lin.base_layer.weight, untouched.text.lin.weight)  # type: ignore[union-attr]


def test_collisions_are_refused() -> None:
    model = Model()
    inject(plan(model.text, lora(["lin"]), "same"))
    inject(plan(model.image, lora(["lin"]), "same"))
    names = set(model.state_dict())
    with pytest.raises(AdapterNameError, match=r"both have 'same'"):
        plan(model, lora(["top"]), "w")
    assert set(model.state_dict()) == names
    model, _ = parts()
    with pytest.raises(AdapterNameError, match=r"already an adapter 'i'"):
        plan(model, lora(["top"]), "i")
    model = Model()
    inject(plan(model.text, lora(["lin"]), "a"))
    inject(plan(model.image, lora(["lin"]), "b", policy=PEFT))
    with pytest.raises(StateError, match=r"policies 'inlay' and 'peft'"):
        plan(model, lora(["top"]), "w")


def test_a_larger_model_around_one_part() -> None:
    torch.manual_seed(0)
    model = Model()
    untouched = copy.deepcopy(model)
    state = inject(plan(model.text, lora(["lin"], bias="all"), "t"))
    assert inject(plan(model, lora(["top", "head"]), "w")) is state
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        *(f"{p}.lora_{m}.w.weight" for p in ("top", "text.head", "image.head") for m in "AB"),
        *(f"text.lin.lora_{m}.t.weight" for m in "AB"),
        "text.lin.base_layer.bias",
        "text.head.base_layer.bias",
    }
    with torch.no_grad():
        model.text.lin.base_layer.bias.add_(1.0)  # type: ignore[union-attr]
    eject(model, state)
    assert all(torch.equal(tensor, untouched.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_part_of_the_model() -> None:
    torch.manual_seed(0)
    model = Model()
    untouched = copy.deepcopy(model)
    state = inject(plan(model, lora(["lin"]), "whole"))
    assert inject(plan(model.image, lora(["lin", "head"], bias="all"), "part")) is state
    assert {layer.site.name for layer in state.layers()} == {"text.lin", "image.lin", "image.head"}
    with torch.no_grad():
        model.image.head.base_layer.bias.add_(1.0)  # type: ignore[union-attr]
    set_active(state, ["whole", "part"])
    assert not torch.allclose(model(X), untouched(X))
    eject(model, state)
    assert all(torch.equal(tensor, untouched.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
