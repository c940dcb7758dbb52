"""Low-rank updates of a linear layer, split where they are narrow.

``y = x W^T + bias + sum_i s_i (drop(x) A_i^T) B_i^T`` is two steps. The shrink takes the input to the ranks, one
product for every update of every layer that reads this input; the expand makes the base product and adds each update
into it in place, without a kernel for scale or sum. So backward needs the input once, in its own dtype, and the
rank-wide products; nothing as wide as the output, unless rows are scaled (DoRA).

Shapes: x (*, in), A (r, in), B (out, r), t = drop(x) A^T (*, r), W (out, in), y (*, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.lowrank_products import (
    add_updates,
    down_gradients,
    multiplied,
    rows_of,
    shrunk,
    side_by_side,
    stacked,
    up_gradients,
)
from inlay.kernels.masks import Mask

__all__ = ["expand", "shrink"]


def shrink(x: Tensor, groups: Sequence[Sequence[Tensor]], dtype: torch.dtype, mask: Mask | None = None) -> list[Tensor]:
    """Multiply one input by the first factors of several layers, in one product.

    Args:
        x: (*, in).
        groups: the factors A, (r, in), of the updates of each layer.
        dtype: what the product runs in.
        mask: which elements of the input to keep; their scale is left to the caller.

    Returns:
        One tensor per layer, (*, sum of its ranks).
    """
    factors = [A for group in groups for A in group]
    widths = [sum(A.shape[0] for A in group) for group in groups]
    if torch.is_grad_enabled() and (x.requires_grad or any(A.requires_grad for A in factors)):
        counts = [len(group) for group in groups]
        return list(_Shrink.apply(x, mask, dtype, widths, counts, *factors))
    return list(_split(shrunk(x, factors, dtype, None if mask is None else mask.bits()), widths))


def _split(t: Tensor, widths: Sequence[int]) -> tuple[Tensor, ...]:
    return (t,) if len(widths) == 1 else t.split(widths, dim=-1)


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Mask | None,
        dtype: torch.dtype,
        widths: list[int],
        counts: list[int],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        t = shrunk(x, factors, dtype, None if mask is None else mask.bits())
        kept = None if mask is None else mask.kept
        wanted = any(ctx.needs_input_grad[5:])  # a frozen A leaves nothing to keep the input for
        ctx.save_for_backward(x if wanted else None, kept, *factors)
        ctx.shape, ctx.given = x.shape, x.dtype
        ctx.mask = mask if kept is None else None  # saved bits are the graph's to free
        ctx.dtype, ctx.widths, ctx.counts = dtype, widths, counts
        ctx.set_materialize_grads(False)
        return _split(t, widths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, bits, *factors = ctx.saved_tensors
        used: list[int] = []  # positions of the factors whose layer has a gradient
        position = 0
        for grad, count in zip(grads, ctx.counts, strict=True):
            if grad is not None:
                used.extend(range(position, position + count))
            position += count
        out: list[Tensor | None] = [None] * (5 + len(factors))
        if not used:
            return tuple(out)
        if bits is None and ctx.mask is not None:
            bits = ctx.mask.bits()
        narrow = [rows_of(grad) for grad in grads if grad is not None]
        dt = narrow[0] if len(narrow) == 1 else torch.cat(narrow, dim=-1)
        held = [factors[i] for i in used]
        if ctx.needs_input_grad[0]:
            dx = (dt @ stacked(held, ctx.dtype)).view(ctx.shape)
            out[0] = (dx if bits is None else dx * bits).to(ctx.given)
        for i, part in zip(
            used, down_gradients(dt, x, held, bits, [ctx.needs_input_grad[5 + i] for i in used]), strict=True
        ):
            out[5 + i] = part
        return tuple(out)


def expand(
    base: Tensor | tuple[Tensor, Tensor, Tensor | None],
    narrow: Sequence[Tensor],
    factors: Sequence[Sequence[Tensor]],
    scales: Sequence[Sequence[float]],
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Add low-rank updates to a layer's output.

    Args:
        base: the layer's output, (*, out), which is left as it is; or (x, W, its bias) to make it from. W gets no
            gradient.
        narrow: t = drop(x) A^T, (*, sum of ranks) each.
        factors: for each t the factors B, (out, r), that follow one another in it.
        scales: the scale of each update.
        gain: (out,) multiplies base product and updates, but not ``bias``.
        bias: (out,) is added last; with ``gain`` only, where the base must come without its own.

    Returns:
        (*, out), in the dtype of the base.
    """
    x, weight, own = (None, None, None) if isinstance(base, Tensor) else base
    given = base if isinstance(base, Tensor) else None
    flat = [B for group in factors for B in group]
    inputs = (x, given, own, gain, bias, *narrow, *flat)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        counts = [len(group) for group in factors]
        return _Expand.apply(x, weight, given, own, gain, bias, scales, counts, *narrow, *flat)
    return add_updates(x, weight, given, own, gain, bias, narrow, _ups(narrow, factors, scales))[0]


def _ups(
    narrow: Sequence[Tensor], factors: Sequence[Sequence[Tensor]], scales: Sequence[Sequence[float]]
) -> list[tuple[Tensor, float]]:
    """Return for each t its factors side by side, and one scale."""
    return [side_by_side(group, held, t) for group, held, t in zip(factors, scales, narrow, strict=True)]


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor | None,
        weight: Tensor | None,
        given: Tensor | None,
        own: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        scales: Sequence[Sequence[float]],
        counts: list[int],
        *tensors: Tensor,
    ) -> Tensor:
        narrow, flat = tensors[: len(counts)], tensors[len(counts) :]
        factors = _grouped(flat, counts)
        y, z = add_updates(x, weight, given, own, gain, bias, narrow, _ups(narrow, factors, scales))
        before = z if gain is not None and gain.requires_grad else None
        ctx.save_for_backward(weight if x is not None and x.requires_grad else None, gain, before, *tensors)
        ctx.scales, ctx.counts = scales, counts
        ctx.shape = None if x is None else x.shape
        ctx.dtypes = (own.dtype if own is not None else None, bias.dtype if bias is not None else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, before, *tensors = ctx.saved_tensors
        counts, needs = ctx.counts, ctx.needs_input_grad
        narrow, flat = tensors[: len(counts)], tensors[len(counts) :]
        dz, ends = multiplied(dy, gain, before, (needs[3], needs[4], needs[5]), ctx.dtypes)
        out: list[Tensor | None] = [None] * (8 + len(tensors))
        if needs[0]:
            out[0] = (dz @ weight).view(ctx.shape)
        if needs[2]:
            out[2] = dz.view(dy.shape)
        out[3:6] = ends
        position = 8 + len(counts)
        for i, (t, factors, scales) in enumerate(zip(narrow, _grouped(flat, counts), ctx.scales, strict=True)):
            end = position + len(factors)
            dt, out[position:end] = up_gradients(dz, t, factors, scales, needs[8 + i], needs[position:end])
            out[8 + i] = None if dt is None else dt.view(t.shape)
            position = end
        return tuple(out)


def _grouped(flat: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    groups, position = [], 0
    for count in counts:
        groups.append(flat[position : position + count])
        position += count
    return groups
