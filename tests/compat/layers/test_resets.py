"""Layers give an adapter fresh values under PEFT's names: a trained adapter changes nothing then, or draws anew."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.compat.layers.resets import MEMBERS
from inlay.core.registry import config_class

# layer -> method, config fields, arguments of its functions that must be given
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "c3a.layer.C3ALayer": ("C3A", {"block_size": 4}, {"init_weights": True}),
    "delora.layer.DeloraLayer": ("DELORA", {"r": 2}, {}),
    "frod.layer.FrodLayer": ("FROD", {}, {}),
    "lily.layer.LilyLayer": ("LILY", {"r": 2, "num_B": 2}, {}),
    "lokr.layer.LoKrLayer": ("LOKR", {"r": 2}, {}),
    "miss.layer.MissLayer": ("MISS", {"r": 2}, {"r": 2, "mini_r": 1}),
    "poly.layer.PolyLayer": ("POLY", {"r": 2, "n_tasks": 1}, {"init_weights": True}),
    "pvera.layer.PveraLayer": ("PVERA", {"r": 2}, {}),
    "randlora.layer.RandLoraLayer": ("RANDLORA", {"r": 2}, {}),
    "shira.layer.ShiraLayer": ("SHIRA", {"r": 2}, {}),
    "vblora.layer.VBLoRALayer": ("VBLORA", {"r": 2, "num_vectors": 4, "vector_length": 4}, {"init_logits_std": 0.1}),
    "waveft.layer.WaveFTLayer": ("WAVEFT", {"n_frequency": 8}, {}),
}


def test_every_layer_has_a_case():
    assert {f"tuners.{name}" for name in CASES} == MEMBERS.keys()


@pytest.mark.parametrize("name", CASES)
def test_names_and_signatures_are_pefts(name: str) -> None:
    module, _, cls = name.rpartition(".")
    theirs = getattr(import_module(f"peft.tuners.{module}"), cls)
    for function, ours in vars(MEMBERS[f"tuners.{name}"]).items():
        if function.startswith("reset"):
            expected = inspect.signature(getattr(theirs, function)).parameters
            found = inspect.signature(ours).parameters
            assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in expected.values()]


@pytest.mark.parametrize("name", CASES)
def test_a_trained_adapter_starts_again(name: str) -> None:
    method, fields, arguments = CASES[name]
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(3, 8)
    plain = base(x).detach()
    model: Any = inlay.get_peft_model(base, config_class(method)(target_modules=["0"], **fields)).eval()
    fresh = model(x).detach()
    layer = model.base_model.model[0]
    trained = [p for p in layer.parameters() if p.requires_grad]
    function = next(f for f in vars(MEMBERS[f"tuners.{name}"]) if f.startswith("reset"))
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter))
        assert not torch.equal(model(x), fresh)
        before = [p.clone() for p in trained]
        wanted = inspect.signature(getattr(layer, function)).parameters
        getattr(layer, function)("default", **{key: value for key, value in arguments.items() if key in wanted})
        assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
        if torch.allclose(fresh, plain, atol=1e-5):
            torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-5)
