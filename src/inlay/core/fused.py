"""When a layer's low-rank updates run on the fused path of ``kernels.lowrank``, and when they cannot.

The path is for plain tensors on layers that multiply features by a matrix. It makes the base product itself where the
base layer is nothing but that product; where it is more (hooks, another forward, a quantised or trained weight) the
base layer is called, and only the update is fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from inlay.core.affine import Delta, LowRank
from inlay.core.dtype import autocast_dtype, product_dtype
from inlay.core.method import Method, P
from inlay.core.sharing import Narrow, narrow
from inlay.kernels.lowrank import expand
from inlay.kernels.lowrank_linear import low_rank_linear
from inlay.kernels.switch import fast_paths_on

if TYPE_CHECKING:
    from inlay.core.entry import Entry
    from inlay.core.layer import AdaptedLayer

__all__ = [
    "Updates",
    "active_dropout",
    "chain_reason",
    "delta_reason",
    "fused_dtype",
    "input_reason",
    "own_product",
    "product_reason",
    "run_chain",
    "run_updates",
    "updates_of",
]

_PLAIN = (Tensor, nn.Parameter)


class Updates:
    """The low-rank updates of one layer in one forward.

    Attributes:
        deltas: in the order of the chain.
        drops: the dropout of each, None where nothing is dropped.
        dtype: of the products.
    """

    __slots__ = ("deltas", "drops", "dtype")

    def __init__(self, deltas: list[LowRank], drops: list[nn.Module | None], dtype: torch.dtype) -> None:
        self.deltas = deltas
        self.drops = drops
        self.dtype = dtype


def chain_reason(layer: AdaptedLayer, chain: Sequence[Entry]) -> str | None:
    """Return why a chain cannot run as one sum of low-rank updates, or None; does not depend on the input."""
    if not layer.kind.multiplies:
        return f"layers of kind {layer.kind.name} run an update with the layer's own geometry"
    for entry in chain:
        method = entry.method
        if not method.additive or type(method).forward is not Method.forward:
            return f"{type(method).__name__} has a forward pass of its own"
        if entry.skip_probability > 0.0:
            return "module_dropout decides for each forward whether there is an update"
        delta = method.delta(entry.site, layer.params(entry))
        reason = delta_reason(delta)
        if reason is not None:
            return reason
    return None


def delta_reason(delta: Delta) -> str | None:
    """Return why an update cannot be fused, or None."""
    if type(delta) is not LowRank:
        return f"the update is held as {type(delta).__name__}, which has no rank to go through"
    if type(delta.A) not in _PLAIN or type(delta.B) not in _PLAIN:
        return f"the adapter's tensors are spread over processes or of another class ({type(delta.A).__name__})"
    return None


def input_reason(x: object) -> str | None:
    """Return why this input, or what is going on around it, needs the generic path, or None."""
    if type(x) not in _PLAIN or not x.is_floating_point():  # type: ignore[attr-defined]
        return f"the input is a {type(x).__name__}, not a plain tensor of features"
    if x.layout is not torch.strided or x.is_nested:  # type: ignore[attr-defined]
        return "the input is not a dense tensor"
    if not fast_paths_on():
        return "fast paths are switched off"
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "a functorch transform or forward-mode differentiation is active"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit traces the model, which records no Python functions"
    return None


def updates_of(layer: AdaptedLayer, chain: Sequence[Entry], x: Tensor) -> Updates | None:
    """Collect the updates of a chain that :func:`chain_reason` lets through; None where tensors are not plain."""
    deltas: list[LowRank] = []
    drops: list[nn.Module | None] = []
    for entry in chain:
        p = layer.params(entry)
        delta = entry.method.update(entry.site, p)
        if delta_reason(delta) is not None:
            return None
        deltas.append(delta)  # type: ignore[arg-type]
        drops.append(active_dropout(p))
    return Updates(deltas, drops, fused_dtype(layer, deltas, x))


def fused_dtype(layer: AdaptedLayer, deltas: Sequence[LowRank], x: Tensor) -> torch.dtype:
    """Return the dtype that products run in: autocast's where it is on, else the widest that ``core.dtype`` says."""
    cast = autocast_dtype(x.device)
    if cast is not None and x.dtype != torch.float64:
        return cast
    dtype = product_dtype(x, deltas[0].A.dtype, layer.compute)
    for delta in deltas[1:]:
        dtype = torch.promote_types(dtype, product_dtype(x, delta.A.dtype, layer.compute))
    return dtype


def active_dropout(p: P) -> nn.Module | None:
    """Return the adapter's dropout, if it drops anything now."""
    drop: Any = p._dropout
    if drop is None or isinstance(drop, nn.Identity):
        return None
    return None if type(drop) is nn.Dropout and (not drop.training or drop.p == 0.0) else drop


def run_chain(
    layer: AdaptedLayer, chain: tuple[Entry, ...], x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Run a layer with a chain that :func:`chain_reason` lets through; None if this input needs the generic path."""
    if input_reason(x) is not None:
        return None
    updates = updates_of(layer, chain, x)
    if updates is None:
        return None
    return run_updates(layer, chain, updates, x, args, kwargs)


def run_updates(
    layer: AdaptedLayer,
    entries: tuple[Entry, ...],
    updates: Updates,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the layer's output with low-rank updates.

    Args:
        layer: the layer.
        entries: whose updates they are.
        updates: of these entries.
        x: (*, in).
        args, kwargs: what the base layer gets besides.
        gain: (out,) multiplies the base product and the updates, but not the layer's bias.
        bias: the layer's bias, with ``gain``.
    """
    product = None if args or kwargs else own_product(layer, x)
    base: Tensor | tuple[Tensor, Tensor, Tensor | None]
    if product is None:
        output: Tensor = layer.base_layer(x, *args, **kwargs)
        base = output if gain is None or bias is None else output - bias
    else:
        weight, own = product
        base = (x.to(weight.dtype), weight, None if gain is not None else own)
    for delta in updates.deltas:
        if delta.bias is not None:
            extra = delta.bias * delta.scale
            bias = extra if bias is None else bias + extra
    y = combined(base, narrow(layer, entries, updates, x), gain, None if gain is None else bias)
    return y if gain is not None or bias is None else y + bias.to(y.dtype)


def combined(
    base: Tensor | tuple[Tensor, Tensor, Tensor | None],
    parts: Sequence[Narrow],
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return a layer's output with what comes through its ranks; see :func:`inlay.kernels.lowrank.expand`."""
    if len(parts) == 1 and isinstance(base, tuple) and parts[0].one_step(base[0].dtype):
        part = parts[0]
        downs = [delta.A for delta in part.deltas]
        return low_rank_linear(base, downs, part.factors, part.scales, part.mask, gain, bias)
    factors, scales = [part.factors for part in parts], [part.scales for part in parts]
    return expand(base, [part.product() for part in parts], factors, scales, gain, bias)


def product_reason(layer: AdaptedLayer) -> str | None:
    """Return why the base layer has to be called for its product, or None where its weight and bias say all of it."""
    base: Any = layer._modules["base_layer"]
    found = layer.kind.plain_tensors(base)
    if found is None:
        return f"{type(base).__name__} has a forward of its own, or its weight is computed"
    own = base.__dict__
    if "forward" in own:
        return "the forward of the base layer was replaced"
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooks or nn.modules.module._has_any_global_hook():
        return "there are hooks on the call of the base layer"
    weight, bias = found
    if type(weight) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return f"the weight of the base layer is a {type(weight).__name__}, not a plain tensor"
    if weight.requires_grad:
        return "the weight of the base layer is being trained"
    return None if weight.is_floating_point() else f"the weight of the base layer is held as {weight.dtype}"


def own_product(layer: AdaptedLayer, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return weight (out, in) and bias if the base layer is nothing but their product with ``x``, which then needs no
    call of it; None otherwise."""
    if product_reason(layer) is not None:
        return None
    found = layer.kind.plain_tensors(layer._modules["base_layer"])
    assert found is not None
    weight, bias = found
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        if x.dtype == torch.float64 or weight.dtype == torch.float64:
            return None
        return weight.to(dtype), None if bias is None else bias.to(dtype)
    return (weight, bias) if weight.dtype == x.dtype and weight.device == x.device else None
