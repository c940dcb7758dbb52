"""What PEFT asks of a layer's storage. Inlay's own answer is ``core.storage``; the classes come with it."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["get_quantization_kwargs", "quantization_extra_repr", "resolve_quantization_backend"]


def resolve_quantization_backend(base_layer: nn.Module, **kwargs: Any) -> Any:
    """Return how a layer's weight is packed, None for a plain one."""
    return None


def quantization_extra_repr(module: nn.Module) -> str:
    """Return what a layer's description says of its packing: nothing for a plain one."""
    backend = getattr(module, "quantization_backend", None)
    return "" if backend is None else f"quantization_backend={getattr(backend, 'backend_name', backend)}"


def get_quantization_kwargs(model: nn.Module) -> dict[str, Any]:
    """Return what is needed to pack a merged weight again: nothing for a plain model."""
    return {}
