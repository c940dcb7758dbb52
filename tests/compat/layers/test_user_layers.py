"""Layers that users write: mixins with a forward of their own, scales, and a model's state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_twins import OURS, PEFT, get
from torch import nn

from inlay.core.call import opened
from inlay.core.state import State

LIBRARIES = [PEFT, OURS]


def mixin_layer(library: str) -> Any:
    """Return a layer as users write it: a module that has LoraLayer's dicts and its own forward."""
    LoraLayer = get(library, "tuners.lora.layer.LoraLayer")

    class Mine(nn.Module, LoraLayer):
        def __init__(self, base: nn.Module, name: str, config: Any, r: int, lora_alpha: int, **kwargs: Any) -> None:
            super().__init__()
            LoraLayer.__init__(self, base, **kwargs)
            self._active_adapter = name
            self.update_layer(name, r, lora_alpha=lora_alpha, config=config)

        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self._check_forward_args(x, *args, **kwargs)
            names = kwargs.pop("adapter_names", None)
            if self.disable_adapters:
                return self.base_layer(x)
            if names is not None:
                return self._mixed_batch_forward(x, *args, adapter_names=names, **kwargs)
            y = self.base_layer(x)
            for name in self.active_adapters:
                if name in self.lora_A:
                    A, B = self.lora_A[name], self.lora_B[name]
                    y = (
                        y
                        + B(A(self.lora_dropout[name](self._cast_input_dtype(x, A.weight.dtype)))) * self.scaling[name]
                    )
            return y

    torch.manual_seed(0)
    return Mine(nn.Linear(6, 4), "default", get(library, "LoraConfig")(use_rslora=True), 2, 4)


def weights(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in layer.named_parameters()}


def test_a_mixin_has_what_peft_gives_it() -> None:
    theirs, ours = map(mixin_layer, LIBRARIES)
    assert weights(ours) == weights(theirs)
    for name in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "in_features", "out_features"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for layer in (theirs, ours):
        layer.update_layer("other", 3, lora_alpha=6, config=get(PEFT if layer is theirs else OURS, "LoraConfig")())
    gradients = [{n: p.requires_grad for n, p in layer.named_parameters()} for layer in (theirs, ours)]
    assert gradients[0] == gradients[1]
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_()
            dict(ours.named_parameters())[name].copy_(parameter)
    x = torch.randn(3, 6)
    for change in (
        lambda layer: layer.set_adapter(["default", "other"]),
        lambda layer: layer.set_scale("other", 3.0),
        lambda layer: layer.scale_layer(2.0),
        lambda layer: layer.unscale_layer(),
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.set_requires_grad("other", False),
        lambda layer: layer.delete_adapter("other"),
    ):
        change(theirs)
        change(ours)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        assert ours.active_adapters == theirs.active_adapters
        assert ours._all_available_adapter_names() == theirs._all_available_adapter_names()
        assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
            n: p.requires_grad for n, p in theirs.named_parameters()
        }
    names = ["default", "__base__", "default"]
    assert torch.allclose(ours(x, adapter_names=names), theirs(x, adapter_names=names), atol=1e-5)
    assert ours.supports_lora_conversion() == theirs.supports_lora_conversion()


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_mixin_refuses_a_variant_that_it_does_not_have(library: str) -> None:
    layer = mixin_layer(library)
    with pytest.raises(ValueError, match="use_dora"):
        layer.update_layer("dora", 2, lora_alpha=2, config=get(library, "LoraConfig")(use_dora=True))


@pytest.mark.parametrize("library", LIBRARIES)
def test_deleting_the_active_adapter_of_a_mixin(library: str) -> None:
    layer = mixin_layer(library)
    layer.update_layer("other", 3, lora_alpha=6, config=get(library, "LoraConfig")())
    with pytest.warns(UserWarning, match="other"):
        layer.delete_adapter("default")
    assert layer.active_adapters == ["other"]
    layer.delete_adapter("other")
    assert layer.active_adapters == []


def test_a_mixin_follows_a_state() -> None:
    layer, state = mixin_layer(OURS), State()
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(2, 6)
    layer.follow_state(state)
    on = layer(x)
    with opened(state, disabled=True):
        assert layer.disable_adapters
        assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer(x), on)
    state.enabled = False
    assert layer.disable_adapters
    layer.follow_state(None)
    assert torch.equal(layer(x), on)


@pytest.mark.parametrize("method", ["ia3", "loha", "oft", "vera", "fourierft"])
def test_mixins_of_other_methods_make_their_tensors(method: str) -> None:
    cls, config, arguments = {
        "ia3": ("IA3Layer", {"feedforward_modules": []}, {}),
        "loha": ("LoHaLayer", {}, {"r": 2, "alpha": 4}),
        "oft": ("OFTLayer", {"oft_block_size": 2}, {"r": 0}),
        "vera": ("VeraLayer", {"r": 4}, {"vera_A": None, "vera_B": None, "r": 4}),
        "fourierft": ("FourierFTLayer", {}, {"n_frequency": 5}),
    }[method]
    names = {"ia3": "IA3Config", "loha": "LoHaConfig", "oft": "OFTConfig", "vera": "VeraConfig"}
    mixin = get(OURS, f"tuners.{method}.layer.{cls}")

    class Mine(*([mixin] if issubclass(mixin, nn.Module) else [nn.Module, mixin])):  # type: ignore[misc]
        def __init__(self, base: nn.Module) -> None:
            nn.Module.__init__(self)
            extra = {"is_feedforward": False} if method == "ia3" else {}
            mixin.__init__(self, base, **extra)

    layer = Mine(nn.Linear(6, 4))
    made = get(OURS, names.get(method, "FourierFTConfig"))(**config)
    layer.update_layer("default", config=made, **arguments)
    held = [name for name in layer.adapter_layer_names if "default" in getattr(layer, name)]
    assert held
    assert all(p.requires_grad for n, p in layer.named_parameters() if "base_layer" not in n)
    assert isinstance(layer, mixin)
    layer.set_requires_grad("default", False)
    assert not any(p.requires_grad for n, p in layer.named_parameters() if "base_layer" not in n)
