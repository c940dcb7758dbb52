"""Subclasses of peft's classes that users write, by themselves and in a model; variants; layers of several methods."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from layer_twins import OURS, PEFT, get
from torch import nn

from inlay.core.call import opened

LIBRARIES = [PEFT, OURS]


def subclass(library: str) -> Any:
    Linear = get(library, "tuners.lora.layer.Linear")

    class Gated(Linear):  # type: ignore[misc, valid-type]
        """Doubles the update, counts its calls, and has a gate of its own."""

        calls: list[str]

        def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
            self.__dict__.setdefault("calls", []).append(f"update {adapter_name}")
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            self.__dict__.setdefault("gates", {})[adapter_name] = 2.0

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            y = super().forward(x, *args, **kwargs)
            base = self.base_layer(x)
            return base if self.disable_adapters else base + 2 * (y - base)

        def get_delta_weight(self, adapter: str) -> torch.Tensor:
            return 2 * super().get_delta_weight(adapter)

        def merge(self, *args: Any, **kwargs: Any) -> None:
            self.calls.append("merge")
            super().merge(*args, **kwargs)

        def unmerge(self) -> None:
            self.calls.append("unmerge")
            super().unmerge()

    torch.manual_seed(0)
    return Gated(nn.Linear(6, 4), "default", config=get(library, "LoraConfig")(), r=2, lora_alpha=4)


def test_a_subclass_is_called_in_all_its_parts() -> None:
    theirs, ours = map(subclass, LIBRARIES)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name:
                parameter.normal_()
                dict(ours.named_parameters())[name].copy_(parameter)
    x = torch.randn(3, 6)
    y = ours(x)
    assert torch.allclose(y, theirs(x), atol=1e-5)
    for layer in (theirs, ours):
        layer.merge()
        merged = layer.base_layer(x)
        assert torch.allclose(merged, y, atol=1e-5)
        layer.unmerge()
        assert torch.allclose(layer(x), y, atol=1e-5)
        layer.update_layer("other", 3, lora_alpha=3, config=get(PEFT if layer is theirs else OURS, "LoraConfig")())
        assert layer.calls == ["update default", "merge", "unmerge", "update other"]
        assert layer.gates == {"default": 2.0, "other": 2.0}


def test_a_subclass_inside_a_model() -> None:
    import inlay
    from inlay.compat.layers.constructed import adopt
    from inlay.models.tuner import AdapterModel

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"], r=2), model, "default")
    state = model[0].state
    layer = subclass(OURS)
    layer.lora_B["default"].weight.data.normal_()
    model[1] = layer
    adopt(layer, state, "1")
    x = torch.randn(2, 6)
    on = model(x)
    tuner = AdapterModel.around(model, state.policy)
    with opened(state, disabled=True):
        assert torch.equal(layer(x), layer.base_layer(x))
    tuner.merge_adapter()
    assert layer.calls[-1] == "merge"
    assert layer.merged
    tuner.unmerge_adapter()
    assert layer.calls[-1] == "unmerge"
    assert torch.allclose(model(x), on, atol=1e-6)
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0", "1"], r=3), model, "other")
    assert layer.calls[-1] == "update other"
    assert dict(layer.r) == {"default": 2, "other": 3}
    assert layer.gates == {"default": 2.0, "other": 2.0}


def test_a_failing_merge_takes_a_subclass_s_merge_back() -> None:
    import inlay
    from inlay.compat.layers.constructed import adopt
    from inlay.core.merge import merge

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"], r=2), model, "default")
    layer = subclass(OURS)
    model[1] = layer
    adopt(layer, model[0].state, "1")
    model[0].lora_B["default"].weight.data.fill_(float("inf"))
    weight = layer.base_layer.weight.clone()
    with pytest.raises(inlay.errors.MergeError):
        merge(layer.state)
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, weight)


# -- variants ---------------------------------------------------------------------------------------------------------


def with_variant(library: str) -> Any:
    Linear, Variant = (get(library, f"tuners.lora.layer.{name}") for name in ("Linear", "LoraVariant"))

    class Squared(Variant):  # type: ignore[misc, valid-type]
        """The update's factors are squared."""

        @staticmethod
        def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
            module.__dict__.setdefault("started", []).append(adapter_name)

        @staticmethod
        def update(module: Any, name: str) -> torch.Tensor:
            return module.lora_B[name].weight.square() @ module.lora_A[name].weight * module.scaling[name]

        @staticmethod
        def merge_safe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
            return orig_weight + Squared.update(module, active_adapter)

        @staticmethod
        def merge_unsafe(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
            orig_weight.data = Squared.merge_safe(module, active_adapter, orig_weight)

        @staticmethod
        def unmerge(module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
            return orig_weight - Squared.update(module, active_adapter)

        @staticmethod
        def forward(module: Any, active_adapter: str, x: Any, result: Any, **kwargs: Any) -> torch.Tensor:
            return result + x @ Squared.update(module, active_adapter).T

    class Mine(Linear):  # type: ignore[misc, valid-type]
        def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> Any:
            return Squared() if config.use_rslora else super().resolve_lora_variant(config=config, **kwargs)

    torch.manual_seed(0)
    config = get(library, "LoraConfig")(use_rslora=True)
    return Mine(nn.Linear(6, 4), "default", config=config, r=2, lora_alpha=4)


def test_a_user_s_variant() -> None:
    theirs, ours = map(with_variant, LIBRARIES)
    for layer in (theirs, ours):
        torch.manual_seed(1)
        for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            parameter.data.normal_()
    x = torch.randn(3, 6)
    y = theirs(x)
    assert torch.allclose(ours(x), y, atol=1e-5)
    for layer in (theirs, ours):
        assert layer.started == ["default"]
        layer.merge(safe_merge=True)
        assert torch.allclose(layer(x), y, atol=1e-4)
        layer.unmerge()
        assert torch.allclose(layer(x), y, atol=1e-4)
        layer.update_layer("plain", 2, lora_alpha=2, config=get(PEFT if layer is theirs else OURS, "LoraConfig")())
        assert list(layer.lora_variant) == ["default"]


def test_unsorted_variants_are_refused() -> None:
    class Mine(get(OURS, "tuners.lora.layer.Linear")):  # type: ignore[misc]
        @property
        def lora_variants(self) -> Any:
            return {(): None, ("use_dora", "arrow_config"): None}

    with pytest.raises(ValueError, match="sorted"):
        Mine(nn.Linear(2, 2), "default", config=get(OURS, "LoraConfig")(), r=1)


# -- layers of several methods ----------------------------------------------------------------------------------------


def test_a_layer_of_two_methods_is_an_instance_of_both() -> None:
    import inlay

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4))
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["0"]), model, "a")
    inlay.inject_adapter_in_model(inlay.LoHaConfig(target_modules=["0"], r=2), model, "b")
    layer = model[0]
    for name in ("lora.layer.Linear", "lora.layer.LoraLayer", "loha.layer.Linear", "lycoris_utils.LycorisLayer"):
        assert isinstance(layer, get(OURS, f"tuners.{name}"))
    assert not isinstance(layer, get(OURS, "tuners.ia3.layer.IA3Layer"))
    assert layer._get_available_adapters() == {"a", "b"}
    assert dict(layer.use_dora) == {"a": False}
    layer.set_adapter(["a", "b"])
    for parameter in layer.parameters():
        parameter.data.normal_()
    x = torch.randn(2, 4)
    y = layer(x)
    expected = layer.base_layer(x) + x @ (layer.get_delta_weight("a") + layer.get_delta_weight("b")).T
    assert torch.allclose(y, expected, atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    layer.delete_adapter("a")
    assert not isinstance(layer, get(OURS, "tuners.lora.layer.LoraLayer"))
    assert list(layer.state.records) == ["b"]
