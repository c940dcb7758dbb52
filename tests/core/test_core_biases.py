"""Base biases that train with an adapter go back when it is deleted."""

from __future__ import annotations

import torch
from torch import nn

import inlay
from inlay.core.eject import delete
from inlay.core.inject import inject
from inlay.core.plan import plan


def test_deleting_the_adapter_puts_the_biases_back_and_frees_them_for_another() -> None:
    model = nn.ModuleDict({"lin": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = inject(plan(model, inlay.LoraConfig(target_modules=["other"]), "first"))
    inject(plan(model, inlay.LoraConfig(target_modules=["lin"], bias="all"), "biased"))
    bias = model["other"].bias
    assert bias.requires_grad
    with torch.no_grad():
        bias.add_(1.0)
        model["lin"].bias.add_(1.0)
    delete(model, state, "biased")
    assert not bias.requires_grad
    assert torch.equal(bias, before["other.bias"])
    assert torch.equal(model["lin"].bias, before["lin.bias"])
    inject(plan(model, inlay.LoraConfig(target_modules=["lin"], bias="lora_only"), "again"))
    assert model["lin"].bias.requires_grad
    assert not bias.requires_grad
