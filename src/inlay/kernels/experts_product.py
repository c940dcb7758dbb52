"""A frozen bank of matrices and its low-rank update, multiplied into rows that are sorted by expert.

``y_s = x_s W_e + (read_s A_e^T) B_e`` for the rows s of each expert e, where ``read`` is x, or x with dropout. Nothing
of the size of the bank is made, in forward or backward: the bank is read expert by expert, and gradients are those of
x, A and B.

Shapes: x (S, in), or (T, in), the tokens, which are spread over the rows of their experts here, so that what is kept
for backward is the layer's own input; W (experts, in, out); A (experts, r, in); B (experts, r, out). Where few experts
have rows, A and B may hold those alone (``Segments.used``). W may be absent, or A and B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.errors import UnsupportedError
from inlay.kernels.experts_route import Route, Segments

__all__ = ["bank_product", "gradients", "products"]


def bank_product(
    x: Tensor,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    route: Route,
    spread: bool,
    dropped: Tensor | None = None,
) -> Tensor:
    """Multiply rows by a bank and its update.

    Args:
        x: (S, in), or (T, in) with ``spread``; in the dtype that products run in.
        weight: (experts, in, out), which gets no gradient; a view of the bank as it is stored will do.
        A: (experts, r, in), B: (experts, r, out): the update, with its scale, in the dtype of ``x``.
        route: which rows belong to which expert.
        spread: ``x`` (and ``dropped``) are tokens.
        dropped: what the update reads in place of ``x``.

    Returns:
        (S, out).
    """
    if torch.compiler.is_compiling():
        from inlay.kernels.experts_graph import opaque_product

        rows = route.spread(x) if spread else x
        other = dropped if dropped is None or not spread else route.spread(dropped)
        y: Tensor = opaque_product(rows, other, weight, A, B, route.segments.offsets)[0]
        return y
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, A, B, dropped)):
        found: Tensor = _BankProduct.apply(x, dropped, weight, A, B, route, spread)
        return found
    read = x if dropped is None else dropped
    return products(x, read, weight, A, B, route.segments, route.tokens if spread else None)[0]


class _BankProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        weight: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        route: Route,
        spread: bool,
    ) -> Tensor:
        read = x if dropped is None else dropped
        y, t = products(x, read, weight, A, B, route.segments, route.tokens if spread else None)
        # the bank is frozen: only A has a gradient that needs rows
        ctx.save_for_backward(read if A is not None and A.requires_grad else None, weight, A, B, t)
        ctx.route, ctx.spread, ctx.shared = route, spread, dropped is None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        read, weight, A, B, t = ctx.saved_tensors
        route, spread, needs = ctx.route, ctx.spread, ctx.needs_input_grad
        wanted = (needs[0], needs[1], needs[3], needs[4])
        given = (weight, A, B, t, route.segments, wanted, ctx.shared)
        if torch.is_grad_enabled():
            read = route.spread(read) if read is not None and spread else read
            dx, dread, dA, dB = differentiable_gradients(grad, read, *given)
        else:
            dx, dread, dA, dB = gradients(grad, read, *given, route.tokens if spread else None)
        if spread:
            dx, dread = (None if d is None else route.summed(d) for d in (dx, dread))
        return dx, dread, None, dA, dB, None, None


def products(
    x: Tensor,
    read: Tensor,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    segments: Segments,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return y (S, out), and t = read A^T (S, r).

    ``x`` and ``read`` are sorted rows, unless ``tokens`` (S,) says which row of them is each sorted row.
    """
    count = (x if tokens is None else tokens).shape[0]
    width = (B if weight is None else weight).shape[2]  # type: ignore[union-attr]
    with torch.autocast(x.device.type, enabled=False):
        if one_kernel(segments, x, weight, A, B):
            offsets = segments.offsets
            same = read is x
            x = x if tokens is None else x.index_select(0, tokens)
            read = x if same else read if tokens is None else read.index_select(0, tokens)
            base: Tensor | None = None if weight is None else grouped_mm(x, weight, offs=offsets)
            t, share = x.new_empty(0), None
            if A is not None:
                t = grouped_mm(read, A.mT, offs=offsets)
                share = grouped_mm(t, B, offs=offsets)
            both = [part for part in (base, share) if part is not None]
            return both[0] if len(both) == 1 else both[0].add_(both[1]), t
        lengths, used = segments.on_host()
        make = x.new_empty if count == sum(lengths) else x.new_zeros  # there are rows that belong to no expert
        y, t = make(count, width), x.new_empty(0) if A is None else make(count, A.shape[1])
        start = 0
        for place, (expert, length) in enumerate(zip(used, lengths, strict=True)):
            rows, start = slice(start, start + length), start + length
            ye = y[rows]
            # an expert's rows are gathered where they are used, while they are in the cache
            xe = x[rows] if tokens is None else x.index_select(0, tokens[rows])
            if weight is not None:
                torch.mm(xe, _as(weight[expert], x), out=ye)
            if A is not None and B is not None:
                at = expert if A.shape[0] == segments.experts else place
                te = t[rows]
                if read is not x:
                    xe = read[rows] if tokens is None else read.index_select(0, tokens[rows])
                torch.mm(xe, A[at].mT, out=te)
                if weight is None:
                    torch.mm(te, B[at], out=ye)
                else:
                    ye.addmm_(te, B[at])
        return y, t


def gradients(
    grad: Tensor,
    read: Tensor | None,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    t: Tensor,
    segments: Segments,
    needs: tuple[bool, ...],
    shared: bool,
    tokens: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, of what the update reads (both of sorted rows), of A and of B, those that are needed.

    ``shared``: the update reads x itself, so its share is added to the gradient of x. ``read`` counts for A alone; it
    holds sorted rows, unless ``tokens`` (S,) says which row of it is each sorted row.
    """
    need_x, need_read, need_A, need_B = needs
    back = A is not None and (need_read or (need_x and shared))
    grad = grad.contiguous()  # that of a sum is one number, expanded
    with torch.autocast(grad.device.type, enabled=False):
        if one_kernel(segments, grad, weight, A, B):
            offsets = segments.offsets
            dt = grouped_mm(grad, B.mT, offs=offsets) if B is not None and (need_A or back) else None
            dx = grouped_mm(grad, weight.mT, offs=offsets) if need_x and weight is not None else None
            share = grouped_mm(dt, A, offs=offsets) if back else None
            if shared and need_x:
                dx, share = share if dx is None else dx if share is None else dx.add_(share), None
            if read is not None and tokens is not None:
                read = read.index_select(0, tokens)
            dA = grouped_mm(dt.mT, read, offs=offsets) if dt is not None and need_A else None
            return dx, share, dA, grouped_mm(t.mT, grad, offs=offsets) if need_B else None
        lengths, used = segments.on_host()
        make = grad.new_zeros if grad.shape[0] > sum(lengths) else grad.new_empty
        size = (weight if A is None else A.mT).shape[1]  # type: ignore[union-attr]
        dx, dread = (make(grad.shape[0], size) if need else None for need in (need_x, need_read))
        dA, dB = (
            (grad.new_empty if bank.shape[0] == len(used) else grad.new_zeros)(bank.shape) if need else None  # type: ignore[union-attr]
            for bank, need in ((A, need_A), (B, need_B))
        )
        start = 0
        for place, (expert, length) in enumerate(zip(used, lengths, strict=True)):
            rows, start = slice(start, start + length), start + length
            ge = grad[rows]
            to = None if dx is None else dx[rows]
            if to is not None and weight is not None:
                torch.mm(ge, _as(weight[expert], grad).mT, out=to)
            if A is None or B is None:
                continue
            at = expert if A.shape[0] == segments.experts else place
            if dB is not None:
                torch.mm(t[rows].mT, ge, out=dB[at])
            if not (need_A or back):
                continue
            dt = torch.mm(ge, B[at].mT)
            if dread is not None:
                torch.mm(dt, A[at], out=dread[rows])
            elif to is not None and shared:
                torch.mm(dt, A[at], out=to) if weight is None else to.addmm_(dt, A[at])
            if dA is not None and read is not None:
                re = read[rows] if tokens is None else read.index_select(0, tokens[rows])
                torch.mm(dt.mT, re, out=dA[at])
        return dx, dread, dA, dB


def differentiable_gradients(
    grad: Tensor,
    read: Tensor | None,
    weight: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    _: Tensor,
    segments: Segments,
    needs: tuple[bool, ...],
    shared: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The same out of operators that autograd differentiates again, for gradients of gradients.

    Raises:
        UnsupportedError: B trains and A does not, so that the input was not kept.
    """
    if needs[3] and read is None:
        raise UnsupportedError(
            "gradients of gradients were asked of an expert bank whose A is frozen, and its fast path did not keep "
            "the input; run the forward under inlay.without_fast_paths()"
        )
    lengths, used = segments.on_host()
    beyond = grad.shape[0] - sum(lengths)
    dx, dread = [], []
    dA, dB = ([] if bank is None else list(torch.zeros_like(bank).unbind()) for bank in (A, B))
    parts = zip(used, *(x.split([*lengths, beyond]) for x in (grad, grad if read is None else read)), strict=False)
    for place, (expert, ge, re) in enumerate(parts):
        first = ge.new_zeros(())
        if weight is not None:
            first = ge @ _as(weight[expert], ge).mT
        if A is not None and B is not None:
            at = expert if A.shape[0] == segments.experts else place
            dt = ge @ B[at].mT
            dread.append(dt @ A[at])
            if read is not None:
                dA[at] = dt.mT @ re
                dB[at] = (re @ A[at].mT).mT @ ge  # not the t that was kept, which hangs in no graph
            if shared:
                first = first + dread[-1]
        dx.append(first)
    size = (weight if A is None else A.mT).shape[1]  # type: ignore[union-attr]
    end = grad.new_zeros(beyond, size)
    return (
        torch.cat([*dx, end]) if needs[0] else None,
        torch.cat([*dread, end]) if needs[1] else None,
        torch.stack(dA) if needs[2] else None,
        torch.stack(dB) if needs[3] else None,
    )


def _as(matrix: Tensor, like: Tensor) -> Tensor:
    return matrix if matrix.dtype == like.dtype else matrix.to(like.dtype)


grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def one_kernel(segments: Segments, x: Tensor, *banks: Tensor | None) -> bool:
    """Whether one kernel takes all segments; where sizes are known on the host, a product each is as fast."""
    if segments.lengths is not None or grouped_mm is None or x.device.type != "cuda" or x.dtype != torch.bfloat16:
        return False
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    # the kernel wants rows that begin at multiples of 16 bytes
    return all(
        bank is None
        or (
            bank.dtype == x.dtype
            and bank.shape[0] == segments.experts
            and max(bank.stride()[1:]) * bank.element_size() % 16 == 0
        )
        for bank in banks
    )
