"""``nn.Linear`` and transformers' ``Conv1D``, a linear layer that stores its weight as (in, out)."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core import storage
from inlay.core.affine import Affine, Site
from inlay.core.bare import Light, bare
from inlay.core.kind import Holder, Kind
from inlay.core.slot import Slot

__all__ = ["Factor", "Linear", "bare_linear", "is_conv1d"]


def is_conv1d(cls: type[nn.Module]) -> bool:
    """Whether a class is transformers' ``Conv1D``, without importing transformers."""
    module = sys.modules.get("transformers.pytorch_utils")
    return module is not None and issubclass(cls, module.Conv1D)


class Factor(Light, nn.Linear):
    """An ``nn.Linear`` whose weight is one factor of an adapter."""

    def _get_name(self) -> str:
        return "Linear"


def bare_linear(in_features: int, out_features: int) -> nn.Linear:
    """Return a linear layer that has no tensors yet: a twentieth of the cost of its constructor."""
    linear = bare(Factor)
    own = linear.__dict__
    own["in_features"] = in_features
    own["out_features"] = out_features
    own["_parameters"] = {"weight": None, "bias": None}
    return linear


@lru_cache(maxsize=256)
def _form(kind: str, out: int, channels: int, bias: bool) -> Site:
    """Return the site of a layer without its name; a model has many layers of few shapes."""
    site = Site("", kind, out, channels, bias=bias)
    site.form  # noqa: B018  so that the sites named after it have it
    return site


class Linear(Kind):
    """Weight (out, in); ``Conv1D`` stores (in, out), which the matrix view transposes."""

    name = "linear"
    all_linear = True
    multiplies = True

    def claims(self, module: Any) -> bool:
        return isinstance(module, nn.Linear) or is_conv1d(type(module))

    def site(self, name: str, module: Any) -> Site:
        if not isinstance(module, nn.Linear):
            channels, out = module.weight.shape
            return Site(name, self.name, int(out), int(channels), bias=True, transposed=True)
        biased = module._parameters["bias"] is not None if "bias" in module._parameters else module.bias is not None
        return _form(self.name, int(module.out_features), int(module.in_features), biased).named(name)

    def to_matrix(self, site: Site, stored: Tensor) -> Tensor:
        return stored.t() if site.transposed else stored

    def from_matrix(self, site: Site, weight: Tensor) -> Tensor:
        return weight.t() if site.transposed else weight

    def stored_dims(self, site: Site) -> tuple[str, ...]:
        return ("in", "out") if site.transposed else ("out", "in")

    def product(self, module: Any, site: Site, affine: Affine, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or x.dtype
        bias = None if affine.bias is None else affine.bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), affine.weight.to(dtype), bias)

    def plain_tensors(self, module: Any) -> tuple[Tensor, Tensor | None] | None:
        cls, held = type(module), module._parameters
        weight = held.get("weight")
        if weight is None or "bias" not in held:
            return None
        if cls.forward is nn.Linear.forward:
            return weight, held["bias"]
        if is_conv1d(cls) and cls.forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward:
            return weight.t(), held["bias"]
        return None

    def leaf(self, site: Site, slot: Slot) -> nn.Module:
        if slot.leaf in ("down", "up") and len(slot.shape) == 2:
            return bare_linear(slot.shape[1], slot.shape[0])
        return bare(Holder)

    def weight_dtype(self, module: Any) -> torch.dtype | None:
        return storage.floating_dtype(module, self.weight_name)
