"""Every rule about dtypes, in one place."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adapter_dtype", "autocast_dtype", "merge_dtype", "product_dtype"]

_FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
)
_LOW = (torch.float16, torch.bfloat16, *_FLOAT8)


def adapter_dtype(base: torch.dtype | None, autocast: bool) -> torch.dtype:
    """Return the dtype that adapter tensors are created in.

    The dtype of the base weight, raised from half precision to float32 when ``autocast`` is on, because optimiser
    steps are lost in half precision. A base that has no floating dtype (quantised) gives float32.
    """
    if base is None or not base.is_floating_point:
        return torch.float32
    if autocast and base in _LOW:
        return torch.float32
    return torch.float32 if base in _FLOAT8 else base


def product_dtype(x: Tensor, adapter: torch.dtype, compute: str) -> torch.dtype:
    """Return the dtype in which adapter products run, for input ``x``.

    ``compute="base"`` keeps the input's own dtype (fp32 accumulation happens inside the products);
    ``compute="adapter"`` runs in the adapter's dtype, as PEFT does.
    """
    if compute == "adapter" or not x.is_floating_point():
        return adapter
    return x.dtype


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast runs products in on a device, None where it is off."""
    kind = device.type
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def merge_dtype(weight: torch.dtype) -> torch.dtype:
    """Return the dtype in which a merge is computed before its single rounding."""
    return torch.float64 if weight == torch.float64 else torch.float32
