"""What holds inside a ``with`` block only: other scales, and other rules for the dtype of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from inlay.config import PeftType
from inlay.core.layer import AdaptedLayer
from inlay.errors import ConfigTypeError, TargetError

__all__ = ["disable_input_dtype_casting", "rescale_adapter_scale"]


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply the scale of every adapter of a model that has one inside the ``with`` block.

    A multiplier between 0 and 1 moves the model along the line from the base to the fine-tuned one (WiSE-FT,
    Wortsman et al. 2021, arXiv:2109.01903).

    Under the policy ``peft`` only LoRA is scaled, as there.

    Args:
        model: a ``PeftModel``, a model with injected adapters, or a part of one.
        multiplier: a number.

    Raises:
        ConfigTypeError: ``multiplier`` is no number.
        TargetError: no adapter in the model has a scale.
    """
    if not isinstance(multiplier, (int, float)):
        raise ConfigTypeError(f"multiplier: expected a number, found {type(multiplier).__name__} {multiplier!r}")
    undo: list[Callable[[], object]] = []
    found = False
    try:
        for module in model.modules():
            for scales, name in _scales(module):
                found = True
                before = scales[name]
                undo.append(partial(scales.__setitem__, name, before))
                scales[name] = before * multiplier
        if not found:
            raise TargetError(
                f"this {type(model).__name__} has no adapter, of LoRA or another method, whose scale could be changed"
            )
        yield
    finally:
        for step in undo:
            step()


def _scales(module: Any) -> list[tuple[MutableMapping[str, Any], str]]:
    """Return the places of a module's scales: (mapping, adapter)."""
    if isinstance(module, AdaptedLayer):
        strict = module.state.policy.peft_layers
        names = [
            name
            for name, entries in module.entries.items()
            if any("scaling" in entry.options for entry in entries)
            and (not strict or any(entry.method.config.peft_type == PeftType.LORA for entry in entries))
        ]
        return [(module.scaling, name) for name in names]
    held = module.__dict__.get("scaling")  # a layer that users brought
    if isinstance(held, MutableMapping) and "lora_A" in module._modules:
        return [(held, name) for name in held]
    return []


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Keep adapted layers from casting their input to the adapter's dtype inside the ``with`` block.

    Products then run in the dtype of the input, as they do anyway under the policy ``inlay``. Layerwise casting, which
    holds weights in a narrow dtype between forwards, needs this.

    Args:
        model: a model with adapters, or one layer of it.
        active: False changes nothing.
    """
    changed: list[tuple[Any, bool]] = []
    try:
        for module in model.modules() if active else ():
            if hasattr(type(module), "cast_input_dtype_enabled") or "cast_input_dtype_enabled" in module.__dict__:
                layer: Any = module
                changed.append((layer, layer.cast_input_dtype_enabled))
                layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, before in changed:
            layer.cast_input_dtype_enabled = before
