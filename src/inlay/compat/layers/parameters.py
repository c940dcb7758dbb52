"""What ``lora.ParamWrapper`` has: LoRA on one bare parameter of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from inlay.core.affine import LowRank, Site
from inlay.core.kind import Kind
from inlay.core.layer import AdaptedLayer
from inlay.core.parameter import parameter_layers
from inlay.errors import TargetError, did_you_mean
from inlay.kinds.stacked import Stacked

__all__ = ["ParamMembers"]


class ParamMembers:
    """Beside what every LoRA layer has."""

    @classmethod
    def _place_of(cls, base: nn.Module, given: dict[str, Any]) -> tuple[Kind, Site]:
        leaf = base.get_base_layer() if isinstance(base, AdaptedLayer) else base
        name = given["parameter_name"]
        if name not in leaf._parameters:
            hint = did_you_mean(name, leaf._parameters)
            raise TargetError(f"parameter_name: {type(leaf).__name__} has no parameter {name!r}.{hint}")
        kind = Stacked(name)
        return kind, kind.site(name, leaf)

    @property
    def num_experts(self: Any) -> int:
        """Matrices in the parameter."""
        return int(self.site.experts[0]) if self.site.experts else 1

    @property
    def _param_ndim(self: Any) -> int:
        return int(self.get_param().dim())

    @property
    def _did_swap_in_out_features(self: Any) -> bool:
        return bool(self.site.experts) and not self.site.transposed

    def get_param(self: Any) -> Tensor:
        """Return the parameter as it is stored."""
        parameter: Tensor = getattr(self.leaf_layer, self.parameter_name)
        return parameter

    def get_delta_factors(self: Any, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        """Return ``(lhs, rhs, scaling)``: what an adapter adds to the parameter is ``scaling * lhs @ rhs``."""
        entry = self.entries[adapter_name][0]
        delta: LowRank = entry.method.delta(entry.site, self.params(entry))
        lhs, rhs = (delta.A.mT, delta.B.mT) if self.site.transposed else (delta.B, delta.A)
        dtype = self.get_param().dtype
        return lhs.to(dtype), rhs.to(dtype), entry.options["scaling"]

    @contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        """Nothing to do: the module runs with rewritten parameters and its own are never touched."""
        yield

    def _remove_parametrizations(self) -> None:
        """Nothing to do: there are none."""

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the module, with the adapters of all its parameters written into it if ``merge``."""
        if merge:
            for layer in parameter_layers(self):
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base: nn.Module = self.get_base_layer()
        return base
