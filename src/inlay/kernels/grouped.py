"""Low-rank updates of several adapters in one batch: each adapter's rows go through its own factors.

``y_i += s_k (x_i A_k^T) B_k^T`` for every row i that adapter k serves. The base product is made once for all rows.
Rows of one adapter that follow one another are a slice, so a product per slice needs neither stacked factors nor
copies of rows; where an adapter's samples are scattered and small they are brought together first. Stacking the
factors costs as much as reading them twice, so it is left to who can reuse the stack (``kernels.stacked``).

The choice follows bare loops over sorted rows, without the rest of a layer's call, measured on a CPU over the base
product (fp32, hidden 1024, r 16, 32 samples of one token; 2, 8 and 32 adapters): slices 1.11, 1.26 and 1.71; one
product of all rows with all factors under a mask 1.13, 1.51 and 2.76 with stacking, 1.11, 1.37 and 1.95 without.
``benchmarks.mixed_batch`` has what a whole forward costs.

Shapes: x (samples, rows, in), A (r, in), B (out, r), y (samples, rows, out); r may differ between adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.grouped_backward import backward_pieces
from inlay.kernels.masks import Mask
from inlay.kernels.slices import Slices

__all__ = ["Updates", "add_updates"]


class Updates:
    """What is added, by update: factors, scale, bias and dropout.

    Attributes:
        A, B: the factors, (r, in) and (out, r).
        biases: (out,), or None.
        scales: multiply update and bias.
        drops: probability of dropping an element of the update's input.
        dtype: what products run in.
        own_dropout: draw masks cheaply; otherwise from the random stream that ``torch.nn.functional.dropout`` reads.
    """

    __slots__ = ("A", "B", "biases", "drops", "dtype", "own_dropout", "scales")

    def __init__(
        self,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        scales: Sequence[float],
        drops: Sequence[float],
        dtype: torch.dtype,
        own_dropout: bool = True,
    ) -> None:
        self.A = A
        self.B = B
        self.biases = biases
        self.scales = scales
        self.drops = drops
        self.dtype = dtype
        self.own_dropout = own_dropout


def add_updates(
    base: Tensor | tuple[Tensor, Tensor, Tensor | None], x: Tensor, slices: Slices, updates: Updates
) -> Tensor:
    """Return a layer's output with the update of each sample's own adapter.

    Args:
        base: the layer's output, (*, out), which is left as it is; or (x, W, bias) to make it from, where W (out, in)
            gets no gradient.
        x: (samples, *, in), the input of the updates.
        slices: which rows each update serves.
        updates: one for each number in ``slices``.
    """
    made = None if isinstance(base, Tensor) else base
    given = base if isinstance(base, Tensor) else None
    wide, weight, own = (None, None, None) if made is None else made
    tensors = (*updates.A, *updates.B, *(bias for bias in updates.biases if bias is not None))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, given, own, *tensors)):
        settings = (slices, updates.biases, updates.scales, updates.drops, updates.dtype, updates.own_dropout)
        return _Grouped.apply(x, wide, weight, given, own, settings, *tensors)
    return _forward(x, wide, weight, given, own, slices, updates, None)


class _Kept:
    """What backward needs of each piece: t, and the dropout mask."""

    def __init__(self) -> None:
        self.t: list[Tensor] = []
        self.bits: list[Tensor | None] = []
        self.masks: list[Mask | None] = []
        self.factors: list[float] = []


def _forward(
    x: Tensor,
    wide: Tensor | None,
    weight: Tensor | None,
    given: Tensor | None,
    own: Tensor | None,
    slices: Slices,
    updates: Updates,
    kept: _Kept | None,
) -> Tensor:
    if given is not None:
        y = given.clone(memory_format=torch.contiguous_format) if slices.order is None else slices.sort(given)
        x = slices.sort(x)
    else:
        assert wide is not None
        ordered = slices.sort(wide)
        x = ordered if wide is x else slices.sort(x)
        y = torch.nn.functional.linear(ordered, weight, own)  # type: ignore[arg-type]
    if y.numel():
        _add_in_place(x, y, slices, updates, kept)
    return slices.unsort(y)


def _add_in_place(x: Tensor, y: Tensor, slices: Slices, updates: Updates, kept: _Kept | None) -> None:
    """Add the updates to y, (samples, *, out), contiguous, in the order of the pieces as x is."""
    dtype = updates.dtype
    flat = y.view(-1, y.shape[-1])
    rows = flat.shape[0] // y.shape[0]
    ins = slices.cut(x.reshape(-1, x.shape[-1]), rows)
    outs = slices.cut(flat, rows)
    same = y.dtype == dtype
    cast = x.dtype != dtype
    linear, plain = torch.nn.functional.linear, not any(updates.drops)
    if kept is None and plain and same and not cast and _add_plainly(slices, updates, ins, outs):
        return
    for (k, _, _), given, out in zip(slices.pieces, ins, outs, strict=True):
        A, B, factor = updates.A[k], updates.B[k], updates.scales[k]
        if A.dtype != dtype or B.dtype != dtype:
            A, B = A.to(dtype), B.to(dtype)
        part = given.to(dtype) if cast else given
        if not plain and updates.drops[k] > 0.0:
            part, factor = _dropped(part, updates.drops[k], updates.own_dropout, factor, kept)
        elif kept is not None:
            kept.bits.append(None)
            kept.masks.append(None)
        t = linear(part, A)
        if kept is not None:
            kept.t.append(t)
            kept.factors.append(factor)
        if same:
            out.addmm_(t, B.t(), alpha=factor)
        else:  # products of a higher precision are rounded once, with the sum
            out.copy_(torch.addmm(out.to(dtype), t, B.t(), alpha=factor))
        bias = updates.biases[k]
        if bias is not None:
            out.add_((bias * updates.scales[k]).to(out.dtype))


def _add_plainly(slices: Slices, updates: Updates, ins: list[Tensor], outs: list[Tensor]) -> bool:
    """The loop over pieces where nothing else is to be done, with little asked for each; otherwise return False."""
    if any(bias is not None for bias in updates.biases):
        return False
    dtype, scales = updates.dtype, updates.scales
    if any(tensor.dtype is not dtype for tensor in (*updates.A, *updates.B)):
        return False
    linear, As, Bs = torch.nn.functional.linear, updates.A, updates.B
    on_cpu = ins[0].device.type == "cpu"
    for k, part, out in zip(slices.owners, ins, outs, strict=True):
        if on_cpu and part.shape[0] == 1:  # a matrix times a vector reads the factors with less ado
            out.view(-1).addmv_(Bs[k], torch.mv(As[k], part.view(-1)), alpha=scales[k])
        else:
            out.addmm_(linear(part, As[k]), Bs[k].t(), alpha=scales[k])
    return True


def _dropped(part: Tensor, p: float, own: bool, scale: float, kept: _Kept | None) -> tuple[Tensor, float]:
    """Return the kept elements of an input, and the scale with that of the dropout in it."""
    if own:
        mask = Mask(part, p)
        bits, factor = mask.bits(), scale * mask.scale
        if kept is not None:
            kept.bits.append(mask.kept)
            kept.masks.append(None if mask.kept is not None else mask)
    else:
        bits = torch.empty_like(part).bernoulli_(1 - p).to(torch.uint8)
        factor = scale / (1 - p)
        if kept is not None:
            kept.bits.append(bits)
            kept.masks.append(None)
    return part * bits, factor


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        wide: Tensor | None,
        weight: Tensor | None,
        given: Tensor | None,
        own: Tensor | None,
        settings: Any,
        *tensors: Tensor,
    ) -> Tensor:
        slices, biases, scales, drops, dtype, own_dropout = settings
        updates = _regroup(tensors, biases, scales, drops, dtype, own_dropout)
        kept = _Kept()
        y = _forward(x, wide, weight, given, own, slices, updates, kept)
        ctx.save_for_backward(x, weight if x.requires_grad else None, *tensors, *kept.t, *kept.bits)
        ctx.settings = (slices, [bias is not None for bias in biases], dtype, kept.masks, kept.factors, scales)
        ctx.own_dtype = None if own is None else own.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        slices, biased, dtype, masks, factors, scales = ctx.settings
        count, pieces = len(scales), len(factors)
        x, weight, *saved = ctx.saved_tensors
        A, B = saved[:count], saved[count : 2 * count]
        end = 2 * count + sum(biased)
        ts, bits = saved[end : end + pieces], saved[end + pieces :]
        bits = [mask.bits() if b is None and mask is not None else b for b, mask in zip(bits, masks, strict=True)]
        if torch.is_grad_enabled():  # gradients of gradients go through t as well
            ts = []
        needs = ctx.needs_input_grad
        ordered = slices.sort(dy)
        own = dx = None
        if needs[4]:
            own = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.own_dtype)
        if needs[0]:
            dx = x.new_zeros(x.shape) if weight is None else ordered.matmul(weight)
        inputs = slices.sort(x)
        dx, found = backward_pieces(
            ordered, inputs, dx, slices, A, B, biased, scales, factors, dtype, needs[6:], ts, bits
        )
        for i, (tensor, grad) in enumerate(zip(saved, found, strict=False)):
            found[i] = None if grad is None else grad.to(tensor.dtype)
        if dx is not None:
            dx = slices.unsort(dx).to(x.dtype)
        return (dx, None, None, dy if needs[3] else None, own, None, *found)


def _regroup(
    tensors: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    scales: Sequence[float],
    drops: Sequence[float],
    dtype: torch.dtype,
    own_dropout: bool,
) -> Updates:
    count = len(scales)
    return Updates(tensors[:count], tensors[count : 2 * count], biases, scales, drops, dtype, own_dropout)
