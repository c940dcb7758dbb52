"""Variants of LoRA that users bring: a ``LoraVariant`` per adapter, chosen by ``resolve_lora_variant``."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from inlay.compat.layers.viewing import Own
from inlay.core.affine import Affine, Site
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method, P
from inlay.core.registry import method_class
from inlay.errors import ConfigError, InlayWarning, UnsupportedError

__all__ = ["FURTHER", "Delegated", "LoraVariant", "VariantMembers", "dispatch_default", "give_variant"]

# fields of LoraConfig that ask for a variant: those that the engine carries out, and all
_BUILT = frozenset({"use_dora", "use_bdlora", "velora_config", "monteclora_config", "kasa_config"})
_FLAGS = _BUILT | {"arrow_config", "alora_invocation_tokens"}
ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
UPCAST_DTYPES = [name for name in dir(torch) if name.startswith("float8_")]
VARIANT_KWARG_KEYS = ["alora_offsets"]


class LoraVariant:
    """What one adapter does instead of LoRA's own product. Users give static methods; none keeps a state."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Prepare an adapter, whose tensors are there already."""
        raise NotImplementedError

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight with the adapter written into it, in its stored shape, as a new tensor."""
        raise NotImplementedError

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Write the adapter into the weight in place."""

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor | None:
        """Return the weight without the adapter. Inlay keeps the original and does not need it."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        """Return the whole output, ``result`` being that of what is below."""
        raise NotImplementedError

    def supports_lora_conversion(self) -> bool:
        """Whether the adapter adds a matrix that LoRA could approximate."""
        return False


class Delegated(Method):
    """A method of the engine, carried out by a variant that a user's layer has for the adapter.

    Args:
        method: the method that the variant stands on; its tensors are the adapter's.
        variant: the user's.
        adapter: the adapter's name, by which a variant finds its tensors.
    """

    def __init__(self, method: Method, variant: Any, adapter: str) -> None:
        super().__init__(method.config)
        self.method = method
        self.variant_object = variant
        self.adapter = adapter
        self.prefix_patterns = method.prefix_patterns
        for name in ("config_class", "prefix", "dropout_field", "mixed", "shown"):
            setattr(self, name, getattr(method, name))

    @property
    def commutes(self) -> bool:
        return False

    def slots(self, site: Site) -> Any:
        return self.method.slots(site)

    def options(self, site: Site) -> dict[str, Any]:
        return self.method.options(site)

    def delta(self, site: Site, p: P) -> Any:
        return self.method.delta(site, p)

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        raise UnsupportedError(f"{type(self.variant_object).__name__} works on the layer that it was made for only")

    def forward(self, site: Site, p: P, x: Tensor, inner: Any) -> Tensor:
        result: Tensor = self.variant_object.forward(
            inner.layer, active_adapter=self.adapter, x=x, result=inner(x), **inner.kwargs
        )
        return result


class VariantMembers:
    """The part of ``LoraLayer`` that deals with variants."""

    lora_variant: Any = Own(dict)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """Sorted names of config fields -> the variant class that carries them out, or None for the layer itself."""
        own = sorted(_BUILT) if isinstance(self, AdaptedLayer) else []
        return {(): None, **{(name,): None for name in own}}

    def resolve_lora_variant(self: Any, *, config: Any, **kwargs: Any) -> Any:
        """Return the variant that a config asks for, or None where the layer carries it out itself.

        Raises:
            ConfigError: no class is registered for what it asks, or ``lora_variants`` has keys that are not sorted.
        """
        known = self.lora_variants
        for key in known:
            if tuple(sorted(key)) != tuple(key):
                raise ConfigError(f"lora_variants: expected sorted tuples as keys, found {key}")
        names = {*_FLAGS, *(name for key in known for name in key)}
        asked = tuple(sorted(name for name in names if getattr(config, name, None)))
        if len(asked) > 1 and asked not in known and isinstance(self, AdaptedLayer) and _BUILT.issuperset(asked):
            return None  # the engine's own combine
        if asked not in known:
            raise ConfigError(
                f"{type(self).__name__} has no variant for {', '.join(asked)}; it has: "
                f"{', '.join(' and '.join(key) or 'none' for key in known)}"
            )
        return known[asked]() if known[asked] is not None else None

    def update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Give this layer an adapter's tensors and numbers, and its variant, if the config asks for one.

        Raises:
            ConfigError: a number is not allowed, or no variant carries out the config.
        """
        config = kwargs["config"] if "config" in kwargs else args[2]
        variant = self.resolve_lora_variant(config=config)
        super().update_layer(adapter_name, *args, **kwargs)  # type: ignore[misc]
        if variant is not None:
            self.lora_variant[adapter_name] = variant
            variant.init(self, adapter_name=adapter_name, config=config)

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Drop what an adapter has here, its variant too."""
        super().delete_adapter(adapter_name)  # type: ignore[misc]
        self.lora_variant.pop(adapter_name, None)


class _LoraParameterProxy(nn.Module):
    """A parametrisation that adds an update to a parameter (``torch.nn.utils.parametrize``).

    Args:
        delta_weight: of the parameter's shape; its dtype is that of the sum where the parameter has 8 bits.
    """

    def __init__(self, delta_weight: Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: Tensor) -> Tensor:
        if not str(W.dtype).startswith("torch.float8"):
            return W + self.delta_weight
        limit = torch.finfo(W.dtype).max  # a cast to 8 bits does not saturate by itself
        return (W.to(self.delta_weight.dtype) + self.delta_weight).clamp(-limit, limit).to(W.dtype)


class _LoraFactorsProxy(nn.Module):
    """The same for an update in factors, ``scaling * lhs @ rhs``."""

    def __init__(self, lhs: Tensor, rhs: Tensor, scaling: float) -> None:
        super().__init__()
        self.lhs, self.rhs, self.scaling = lhs, rhs, scaling

    def forward(self, W: Tensor) -> Tensor:
        return _LoraParameterProxy(torch.matmul(self.lhs, self.rhs) * self.scaling)(W)


def dispatch_default(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    """Return PEFT's LoRA layer over a layer, or None where no class stands on its kind.

    ``fan_in_fan_out`` of the config is set to what the layer needs, with a warning if it was not so.
    """
    from inlay.compat.layers.views import provide
    from inlay.core.kind import kind_of

    def made(name: str, **further: Any) -> nn.Module:
        cls: Any = provide("tuners.lora.layer", name)
        layer: nn.Module = cls(target, adapter_name, config=config, **further, **kwargs)
        return layer

    if parameter_name is not None:
        return made("ParamWrapper", parameter_name=parameter_name)
    kind = kind_of(target.get_base_layer() if isinstance(target, AdaptedLayer) else target)
    names = {
        "linear": "Linear",
        "embedding": "Embedding",
        "conv1d": "Conv1d",
        "conv2d": "Conv2d",
        "conv3d": "Conv3d",
        "attention": "MultiheadAttention",
    }
    if kind is None or kind.name not in names:
        return None
    if kind.name != "linear":
        return made(names[kind.name])
    transposed = kind.site("", target).transposed
    if config.fan_in_fan_out != transposed:
        warnings.warn(
            f"fan_in_fan_out: {type(target).__name__} needs {transposed}, found {config.fan_in_fan_out}; it is set",
            InlayWarning,
            stacklevel=2,
        )
        config.fan_in_fan_out = transposed
    return made("Linear", is_target_conv_1d_layer=transposed)


def give_variant(layer: Any, adapter: str, config: Any) -> None:
    """Let the variant that a constructed layer resolves for a config carry out its adapter."""
    variant = layer.resolve_lora_variant(config=config)
    if variant is not None:
        layer.lora_variant[adapter] = variant
        delegate(layer, adapter, variant)
        variant.init(layer, adapter_name=adapter, config=config)


def delegate(layer: AdaptedLayer, adapter: str, variant: Any) -> None:
    """Let a variant carry out an adapter of a layer."""
    entries = layer.entries[adapter]
    for entry in entries:
        if isinstance(entry.method, method_class("LORA")):
            entry.method = Delegated(entry.method, variant, adapter)
    layer.state.touch()


FURTHER: dict[str, Any] = {
    f"tuners.lora.layer.{name}": value
    for name, value in {
        "LoraVariant": LoraVariant,
        "_LoraParameterProxy": _LoraParameterProxy,
        "_LoraFactorsProxy": _LoraFactorsProxy,
        "dispatch_default": dispatch_default,
        "ALLOWED_COMPUTE_DTYPES": ALLOWED_COMPUTE_DTYPES,
        "UPCAST_DTYPES": UPCAST_DTYPES,
        "VARIANT_KWARG_KEYS": VARIANT_KWARG_KEYS,
    }.items()
}
