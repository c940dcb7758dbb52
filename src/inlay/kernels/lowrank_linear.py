"""A linear layer with its low-rank updates as one step, where no other layer shares its rank-wide product.

As two steps (``kernels.lowrank``) the input's gradient is made in two parts, each as wide as the input, that autograd
adds up. Here the narrow part is added into the wide one in place. The input is kept in any case, so where every A is
frozen and nothing asks for it, two steps keep less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, is_grad_enabled
from torch.autograd import Function

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

__all__ = ["low_rank_linear"]


def low_rank_linear(
    base: tuple[Tensor, Tensor, Tensor | None],
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    scales: Sequence[float],
    mask: Mask | None = None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return ``x W^T + own + sum_i s_i (drop(x) A_i^T) B_i^T``, all products in the dtype of ``x`` and ``W``.

    Args:
        base: x (*, in), W (out, in), which gets no gradient, and the layer's own bias.
        downs, ups, scales: A (r, in), B (out, r) and s of each update.
        mask: which elements of the input the updates get; its scale is part of ``scales``.
        gain, bias: as in :func:`inlay.kernels.lowrank.expand`.

    Returns:
        (*, out).
    """
    x, weight, own = base
    inputs = (x, own, gain, bias, *downs, *ups)
    if is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _LowRankLinear.apply(x, weight, own, gain, bias, mask, scales, *downs, *ups)
    t = shrunk(x, downs, x.dtype, None if mask is None else mask.bits())
    return add_updates(x, weight, None, own, gain, bias, [t], [side_by_side(ups, scales, t)])[0]


class _LowRankLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        own: Tensor | None,
        gain: Tensor | None,
        bias: Tensor | None,
        mask: Mask | None,
        scales: Sequence[float],
        *factors: Tensor,
    ) -> Tensor:
        downs, ups = factors[: len(scales)], factors[len(scales) :]
        needs = ctx.needs_input_grad
        t = shrunk(x, downs, x.dtype, None if mask is None else mask.bits())
        y, z = add_updates(x, weight, None, own, gain, bias, [t], [side_by_side(ups, scales, t)])
        kept = None if mask is None else mask.kept
        before = z if needs[3] else None
        ctx.save_for_backward(x, weight if needs[0] else None, gain, before, kept, t, *factors)
        ctx.mask = mask if kept is None else None  # saved bits are the graph's to free
        ctx.scales, ctx.shape = scales, x.shape
        ctx.dtypes = (None if own is None else own.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, gain, before, bits, t, *factors = ctx.saved_tensors
        needs, count = ctx.needs_input_grad, len(ctx.scales)
        downs, ups = factors[:count], factors[count:]
        if bits is None and ctx.mask is not None:
            bits = ctx.mask.bits()
        if is_grad_enabled():  # gradients of gradients: a kept t would not know what it was made of
            t = shrunk(x, downs, x.dtype, bits)
        dz, (d_own, d_gain, d_bias) = multiplied(dy, gain, before, (needs[2], needs[3], needs[4]), ctx.dtypes)
        wanted = needs[7 : 7 + count]
        dt, d_ups = up_gradients(dz, t, ups, ctx.scales, needs[0] or any(wanted), needs[7 + count :])
        d_downs: Sequence[Tensor | None] = [None] * count
        dx = None
        if dt is not None:
            if needs[0]:
                dx = _into_input(dz @ weight, dt, downs, bits).view(ctx.shape)
            d_downs = down_gradients(dt, x, downs, bits, wanted)
        return (dx, None, d_own, d_gain, d_bias, None, None, *d_downs, *d_ups)


def _into_input(dx: Tensor, dt: Tensor, downs: Sequence[Tensor], bits: Tensor | None) -> Tensor:
    """Add what comes back through the ranks to the input's gradient, in place."""
    A = stacked(downs, dx.dtype)
    return dx.addmm_(dt, A) if bits is None else dx.add_((dt @ A).mul_(rows_of(bits)))
