"""What PEFT's LoRA layers have beside weights and numbers by adapter name."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.compat.layers.making import widths
from inlay.compat.layers.mixins import begin_at, refill
from inlay.compat.layers.parameters import ParamMembers
from inlay.compat.layers.variants import FURTHER as _VARIANTS
from inlay.compat.layers.variants import VariantMembers
from inlay.compat.layers.viewing import Derived, Own, listed
from inlay.core.call import opened
from inlay.core.layer import AdaptedLayer
from inlay.core.rebase import begin_again
from inlay.core.route import split_rows
from inlay.core.state import BASE
from inlay.errors import ConfigError, RoutingError, UnknownAdapterError, UnsupportedError
from inlay.kernels.table import look_up
from inlay.methods.lora import LoRA

__all__ = ["FURTHER", "MEMBERS"]


class LoraMembers(VariantMembers):
    """What every LoRA layer has, the engine's and users' own."""

    ephemeral_gpu_offload = False
    _caches: Any = Own(dict)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int | None, int | None]:
        """Return the widths of a layer, None where it does not say them."""
        return widths(module)

    # -- initial values -----------------------------------------------------------------------------------------------

    def reset_lora_parameters(self: Any, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Give an adapter's factors fresh values: A random (``"gaussian"`` or Kaiming-uniform), B zero.

        False leaves them as they are. An embedding reads columns of A, so there A is zero and B normal.

        Raises:
            ConfigError: the start is not known.
        """
        if init_lora_weights is False:
            return
        if init_lora_weights is not True and str(init_lora_weights).lower() != "gaussian":
            raise ConfigError(
                f"Unknown initialization init_lora_weights={init_lora_weights!r}: expected True, False or 'gaussian'; "
                "starts that read the base weight have methods of their own (pissa_init, olora_init, ...)"
            )
        if adapter_name in self.lora_A:
            A, B = self.lora_A[adapter_name].weight, self.lora_B[adapter_name]
            if init_lora_weights is True:
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            else:
                nn.init.normal_(A, std=1 / self.r[adapter_name])
            nn.init.zeros_(B.weight)
            if B.bias is not None:
                nn.init.zeros_(B.bias)
        if adapter_name in self.lora_embedding_A:
            nn.init.zeros_(self.lora_embedding_A[adapter_name])
            nn.init.normal_(self.lora_embedding_B[adapter_name])

    def _begin(self: Any, adapter: str, start: str, **fields: Any) -> None:
        """Give an adapter's factors the values that another start gives them, and change the base as it does.

        Raises:
            ConfigError: there is no such start, or it lacks what it needs.
            UnsupportedError: it is impossible on this layer.
        """
        if isinstance(self, AdaptedLayer):
            held = next((e for e in self.entries[adapter] if isinstance(e.method, LoRA)), None)
            if held is None:
                raise UnknownAdapterError(f"{self.site.name!r} has no LoRA of the name {adapter!r}")
            begin_again(self, held, _started(held.method, held.site, start, fields))
            return
        method, site = self._taken[adapter]
        begin_at(self, adapter, _started(method, site, start, fields), site)

    def pissa_init(self: Any, adapter_name: str, init_lora_weights: str) -> None:
        """Start from the largest singular directions (``pissa``, ``pissa_niter_[number]``)."""
        self._begin(adapter_name, init_lora_weights)

    def corda_init(self: Any, adapter_name: str, init_lora_weights: str) -> None:
        """Start from directions that ``preprocess_corda`` left at the base layer."""
        self._begin(adapter_name, init_lora_weights)

    def olora_init(self: Any, adapter_name: str) -> None:
        """Start from a QR decomposition."""
        self._begin(adapter_name, "olora")

    def mica_init(self: Any, adapter_name: str) -> None:
        """Start from the smallest singular directions, as B."""
        self._begin(adapter_name, "mica")

    def orthogonal_init(self: Any, adapter_name: str) -> None:
        """Start from orthogonal factors.

        Raises:
            ConfigError: the rank is odd.
        """
        r = self.r[adapter_name]
        if r % 2:
            raise ConfigError(f"init_lora_weights='orthogonal' requires the LoRA rank to be even, found r={r}")
        refill(self, adapter_name, init_lora_weights="orthogonal")

    def loftq_init(self: Any, adapter_name: str, config: Any) -> None:
        """Start from what quantising loses, as the configuration's ``loftq_config`` says."""
        self._begin(adapter_name, "loftq", loftq_config=config.loftq_config)

    def lora_ga_init(self: Any, adapter_name: str, lora_ga_config: Any) -> None:
        """Start from the gradient that ``preprocess_loraga`` left at the base layer."""
        self._begin(adapter_name, "lora_ga", lora_ga_config=lora_ga_config)

    # -- forward ------------------------------------------------------------------------------------------------------

    def _check_forward_args(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """Refuse adapters by sample that cannot be honoured.

        Raises:
            RoutingError: there is not one for each sample, or something is merged.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            return
        if len(x) != len(names):
            raise RoutingError(f"adapter_names has {len(names)} names for a batch of {len(x)} samples")
        if self.merged:
            raise RoutingError(
                f"adapter_names cannot be honoured while {', '.join(self.merged_adapters)} is merged; unmerge first"
            )

    def _mixed_batch_forward(self: Any, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
        """Run each adapter on the samples that ask for it."""
        if isinstance(self, AdaptedLayer):
            with opened(self.state, names=adapter_names):
                return AdaptedLayer.forward(self, x, *args, **kwargs)

        def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            y = self.base_layer(*args, **kwargs)
            if name == BASE or name not in self.lora_A:
                return y
            A, B, drop = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            return y + (B(A(drop(args[0].to(A.weight.dtype)))) * self.scaling[name]).to(y.dtype)

        return split_rows(type(self).__name__, tuple(adapter_names), run, (x, *args), kwargs)

    # -- scales of layers that users write; the engine has its own ----------------------------------------------------

    def _rule(self: Any, adapter: str) -> float:
        r = self.r[adapter]
        return float(self.lora_alpha[adapter]) / (math.sqrt(r) if self.use_rslora.get(adapter, False) else r)

    def set_scale(self: Any, adapter: str, scale: float) -> None:
        """Set an adapter's scaling to ``scale`` times what its numbers say."""
        if adapter in self.scaling:
            self.scaling[adapter] = self._rule(adapter) * scale

    def scale_layer(self: Any, scale: float) -> None:
        """Multiply the scaling of the active adapters."""
        for name in listed(self.active_adapters):
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self: Any, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters, or without ``scale`` put back what their numbers say."""
        for name in listed(self.active_adapters):
            if name in self.scaling:
                self.scaling[name] = self._rule(name) if scale is None else self.scaling[name] / scale

    # -- small things -------------------------------------------------------------------------------------------------

    def _cache_store(self: Any, key: str, value: Any) -> None:
        self._caches[key] = value

    def _cache_pop(self: Any, key: str) -> Any:
        return self._caches.pop(key)

    @contextmanager
    def _unmerged_base_weight(self: Any, safe_merge: bool = False) -> Iterator[Tensor]:
        """Give the base weight without what is merged into it."""
        if isinstance(self, AdaptedLayer):
            weight = self.base_affine().weight
            yield self.kind.from_matrix(self.site, weight).detach().clone()
            return
        merged = list(self.merged_adapters)
        if merged:
            self.unmerge()
        try:
            yield self.get_base_weight().clone()
        finally:
            if merged:
                self.merge(safe_merge=safe_merge, adapter_names=merged)


def _started(method: Any, site: Any, start: str, fields: dict[str, Any]) -> LoRA:
    """Return a method like another one with another start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options of the start that it had
        made: LoRA = type(method)(dataclasses.replace(method.config, init_lora_weights=start, **fields))
    made.prefix_patterns = method.prefix_patterns
    numbers = made.options(site)
    reason = made.start.refuse(site, numbers["r"] // site.groups, numbers["scaling"])
    if reason is not None:
        raise UnsupportedError(reason)
    return made


class LinearMembers:
    """Beside that, of linear layers."""

    @Derived
    def is_target_conv_1d_layer(self: Any) -> bool:
        """Whether the base layer stores its weight as (in, out)."""
        return bool(self.fan_in_fan_out)


class EmbeddingMembers:
    """Beside that, of embeddings."""

    device_mesh: Any = None
    tp_layer: Any = None
    input_fns: Any = Own(dict)
    output_fns: Any = Own(dict)

    def _embed(self: Any, input: Tensor, weight: Tensor, input_fn: Any = None, output_fn: Any = None) -> Tensor:
        """Look indices up in another table, with the options of the base layer."""
        rows = look_up(self.get_base_layer(), input if input_fn is None else input_fn(input), weight)
        return rows if output_fn is None else output_fn(rows)


class ConvMembers:
    """Beside that, of convolutions."""

    @Derived
    def _kernel_dim(self: Any) -> int:
        return int(self.get_base_layer().weight.dim())

    def _get_dora_factor_view(self: Any) -> tuple[int, ...]:
        """Return the shape in which a factor for each output multiplies a kernel."""
        return (-1, *[1] * (self._kernel_dim - 1))

    @Derived
    def conv_fn(self: Any) -> Any:
        """The function that convolves."""
        return getattr(torch.nn.functional, f"conv{self._kernel_dim - 2}d")


class AttentionMembers:
    """Beside that, of attention layers."""

    def _restore_weights(self) -> None:
        """Nothing to do: the layer never takes parameters out of its base."""

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the base layer, with its plain output projection, and with adapters written into both if ``merge``."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base: Any = self.get_base_layer()
        if self.output is not None:
            base.out_proj = self.output.get_base_layer()
        module: nn.Module = base
        return module


_LAYER = "tuners.lora.layer."
MEMBERS: dict[str, type[Any]] = {
    f"{_LAYER}LoraLayer": LoraMembers,
    f"{_LAYER}Linear": LinearMembers,
    f"{_LAYER}Embedding": EmbeddingMembers,
    f"{_LAYER}_ConvNd": ConvMembers,
    f"{_LAYER}MultiheadAttention": AttentionMembers,
    f"{_LAYER}ParamWrapper": ParamMembers,
}
FURTHER: dict[str, Any] = dict(_VARIANTS)
