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

from inlay.errors import UnsupportedError
from inlay.kernels.masks import Mask

__all__ = ["expand", "shrink"]

linear = torch.nn.functional.linear


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
    return list(_shrink(x, factors, widths, dtype, None if mask is None else mask.bits()))


def _shrink(
    x: Tensor, factors: Sequence[Tensor], widths: Sequence[int], dtype: torch.dtype, bits: Tensor | None
) -> tuple[Tensor, ...]:
    # two axes for every product here and below: with more, torch's choice of kernel depends on who wants a gradient
    t = linear(_rows(_dropped(x, dtype, bits)), _stacked(factors, dtype)).view(*x.shape[:-1], sum(widths))
    return (t,) if len(widths) == 1 else t.split(widths, dim=-1)


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> Tensor:
    whole = factors[0] if len(factors) == 1 else torch.cat([f.to(dtype) for f in factors], dim)
    return whole.to(dtype)


def _dropped(x: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    x = x.to(dtype)
    return x if bits is None else x * bits


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
        parts = _shrink(x, factors, widths, dtype, None if mask is None else mask.bits())
        kept = None if mask is None else mask.kept
        wanted = any(ctx.needs_input_grad[5:])  # a frozen A leaves nothing to keep the input for
        ctx.save_for_backward(x if wanted else None, kept, *factors)
        ctx.shape, ctx.given = x.shape, x.dtype
        ctx.mask = mask if kept is None else None  # saved bits are the graph's to free
        ctx.dtype, ctx.widths, ctx.counts = dtype, widths, counts
        ctx.set_materialize_grads(False)
        return parts

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
        narrow = [_rows(grad) for grad in grads if grad is not None]
        dt = narrow[0] if len(narrow) == 1 else torch.cat(narrow, dim=-1)
        if ctx.needs_input_grad[0]:
            dx = (dt @ _stacked([factors[i] for i in used], ctx.dtype)).view(ctx.shape)
            out[0] = (dx if bits is None else dx * bits).to(ctx.given)
        if any(ctx.needs_input_grad[5 + i] for i in used):
            kept = _rows(_dropped(x, ctx.dtype, bits))
            parts = (dt.mT @ kept).split([factors[i].shape[0] for i in used])
            for i, part in zip(used, parts, strict=True):
                if ctx.needs_input_grad[5 + i]:
                    out[5 + i] = part.to(factors[i].dtype)
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
    return _expand(x, weight, given, own, gain, bias, narrow, _ups(narrow, factors, scales))[0]


def _ups(
    narrow: Sequence[Tensor], factors: Sequence[Sequence[Tensor]], scales: Sequence[Sequence[float]]
) -> list[tuple[Tensor, float]]:
    """Return for each t its factors side by side, and one scale."""
    return [_up(group, held, t) for group, held, t in zip(factors, scales, narrow, strict=True)]


def _up(factors: Sequence[Tensor], scales: Sequence[float], t: Tensor) -> tuple[Tensor, float]:
    """Return the factors of one t side by side, in its dtype, and the scale that is left for the product."""
    if len(factors) == 1:
        return factors[0].to(t.dtype), scales[0]
    if len(set(scales)) == 1:
        return _stacked(factors, t.dtype, 1), scales[0]
    return torch.cat([B.to(t.dtype) * s for B, s in zip(factors, scales, strict=True)], 1), 1.0


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _expand(
    x: Tensor | None,
    weight: Tensor | None,
    given: Tensor | None,
    own: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    narrow: Sequence[Tensor],
    ups: Sequence[tuple[Tensor, float]],
) -> tuple[Tensor, Tensor]:
    """Return the output, and what ``gain`` multiplied (the same where there is none)."""
    if given is None:
        assert x is not None
        assert weight is not None
        y, shape = linear(_rows(x), weight, own), (*x.shape[:-1], weight.shape[0])
    else:
        y, shape = _rows(given), given.shape
    fresh = given is None
    for t, (B, scale) in zip(narrow, ups, strict=True):
        if t.dtype != y.dtype:  # products of a higher precision are rounded once, with the sum
            y = torch.addmm(y.to(t.dtype), _rows(t), B.mT, alpha=scale).to(y.dtype)
        elif fresh:
            y.addmm_(_rows(t), B.mT, alpha=scale)
        else:
            y = torch.addmm(y, _rows(t), B.mT, alpha=scale)
        fresh = True
    z = y
    if gain is not None:
        y = (z * gain).to(z.dtype)
        if bias is not None:
            y += bias.to(y.dtype)
    # not a view, since torch lets nobody write into one that a custom function returns (``nn.ReLU(inplace=True)``)
    return y if y.shape == shape else torch.ops.aten._unsafe_view.default(y, shape), z


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
        y, z = _expand(x, weight, given, own, gain, bias, narrow, _ups(narrow, factors, scales))
        before = z if gain is not None and gain.requires_grad else None
        ctx.save_for_backward(weight if x is not None and x.requires_grad else None, gain, before, *tensors)
        ctx.scales, ctx.counts = scales, counts
        ctx.shape = None if x is None else x.shape
        ctx.dtypes = (own.dtype if own is not None else None, bias.dtype if bias is not None else None)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, gain, before, *tensors = ctx.saved_tensors
        if gain is not None and torch.is_grad_enabled():
            raise UnsupportedError(
                "a layer whose rows are scaled (DoRA) was asked for gradients of gradients, and its fast path does "
                "not keep what those need; run the forward under inlay.without_fast_paths()"
            )
        counts, needs = ctx.counts, ctx.needs_input_grad
        narrow, flat = tensors[: len(counts)], tensors[len(counts) :]
        rows = _rows(dy)
        dz = rows if gain is None else (rows * gain).to(rows.dtype)
        out: list[Tensor | None] = [None] * (8 + len(tensors))
        if needs[0]:
            out[0] = (dz @ weight).view(ctx.shape)
        if needs[2]:
            out[2] = dz.view(dy.shape)
        for i, dtype in zip((3, 5), ctx.dtypes, strict=True):
            if needs[i]:
                out[i] = rows.sum(0).to(dtype)
        if needs[4]:
            out[4] = torch.sum(rows * before, 0, dtype=torch.promote_types(gain.dtype, torch.float32)).to(gain.dtype)
        position = 8 + len(counts)
        for i, (t, factors, scales) in enumerate(zip(narrow, _grouped(flat, counts), ctx.scales, strict=True)):
            wide = dz.to(t.dtype)
            if needs[8 + i]:
                B, scale = _up(factors, scales, t)
                dt = wide @ B
                out[8 + i] = (dt if scale == 1.0 else dt * scale).view(t.shape)
            if any(needs[position : position + len(factors)]):
                dB = _rows(t).mT @ wide  # (r, out): a narrow result is made much faster lying than standing
                for j, (part, scale) in enumerate(zip(dB.split([B.shape[1] for B in factors]), scales, strict=True)):
                    if needs[position + j]:
                        out[position + j] = (part if scale == 1.0 else part * scale).mT.to(factors[j].dtype)
            position += len(factors)
        return tuple(out)


def _grouped(flat: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    groups, position = [], 0
    for count in counts:
        groups.append(flat[position : position + count])
        position += count
    return groups
