"""Gradients of the low-rank updates of several adapters in one batch; see ``kernels.grouped``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.kernels.slices import Slices

__all__ = ["backward_pieces"]


def backward_pieces(
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    slices: Slices,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    biased: Sequence[bool],
    scales: Sequence[float],
    factors: Sequence[float],
    dtype: torch.dtype,
    needs: Sequence[bool],
    ts: Sequence[Tensor],
    bits: Sequence[Tensor | None],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return dx with the share of the updates added to it, and the gradients of A, B and the biases.

    Args:
        dy: gradient of the output, in the order of the pieces.
        x: the input, in the same order.
        dx: its gradient through the base product, contiguous, which is written over; None if none is asked for.
        slices, A, B, scales, dtype: as in forward.
        biased: which updates have a bias.
        factors: scale by piece, with that of the dropout.
        needs: which of A, B and the biases (those that are there) want a gradient.
        ts: x A^T by piece; empty to make it again.
        bits: the dropout mask by piece.
    """
    count = len(A)
    out: list[Tensor | None] = [None] * len(needs)
    if not dy.numel():
        return dx, out
    rows = dy.shape[:-1].numel() // dy.shape[0]
    grads = slices.cut(dy.reshape(-1, dy.shape[-1]), rows)
    ins = slices.cut(x.reshape(-1, x.shape[-1]), rows)
    twice = torch.is_grad_enabled()  # gradients of gradients: autograd lets nobody write into what split returns
    shares = [None] * len(ins) if dx is None or twice else slices.cut(dx.view(-1, dx.shape[-1]), rows)
    wides: list[Tensor] = []
    seats = {k: 2 * count + i for i, k in enumerate(k for k in range(count) if biased[k])}  # of the biases in `out`
    for i, ((k, _, _), g, part, share) in enumerate(zip(slices.pieces, grads, ins, shares, strict=True)):
        factor, mask = factors[i], bits[i]
        if k in seats and needs[seats[k]]:
            total = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)) * scales[k]
            held = out[seats[k]]
            out[seats[k]] = total if held is None else held + total
        if g.dtype != dtype:
            g = g.to(dtype)
        kept = part if part.dtype == dtype else part.to(dtype)
        if mask is not None:
            kept = kept * mask
        if dx is not None or needs[k]:
            dt = g @ B[k].to(dtype)
            if factor != 1.0:
                dt = dt * factor
            if needs[k]:
                _product_into(out, k, dt, kept)
            if dx is not None:
                down = A[k].to(dtype)
                if share is not None and mask is None and share.dtype == dtype:
                    share.addmm_(dt, down)
                else:
                    wide = dt @ down if mask is None else (dt @ down) * mask
                    wides.append(wide) if share is None else share.add_(wide)
        if needs[count + k]:
            t = ts[i] if ts else kept @ A[k].to(dtype).t()
            _product_into(out, count + k, g, t if factor == 1.0 else t * factor)
    if dx is not None and wides:
        index = [torch.arange(start * rows, stop * rows, device=x.device) for _, start, stop in slices.pieces]
        flat = dx.view(-1, dx.shape[-1])
        dx = flat.index_add(0, torch.cat(index), torch.cat(wides).to(dx.dtype)).view(dx.shape)
    return dx, out


def _product_into(out: list[Tensor | None], position: int, left: Tensor, right: Tensor) -> None:
    """Add ``left^T right`` to a gradient."""
    held = out[position]
    out[position] = left.t() @ right if held is None else held.addmm_(left.t(), right)
