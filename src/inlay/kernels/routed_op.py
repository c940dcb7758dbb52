"""The updates of many adapters as one operator of the graph, for compiled code.

Which rows an adapter serves is an input, not a constant: a graph is made for a set of adapters and serves any order and
share of theirs. The operators are ``inlay::add_routed`` and its backward; eager code calls ``kernels.grouped`` itself,
without the cost of a dispatch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from inlay.kernels.grouped import Updates, add_updates
from inlay.kernels.grouped_backward import backward_pieces
from inlay.kernels.slices import Slices, make_slices

__all__ = ["add_routed"]


@functools.lru_cache(maxsize=64)
def _slices(rows: tuple[int, ...], which: tuple[int, ...], width: int, device: torch.device) -> Slices:
    position = {adapter: i for i, adapter in enumerate(which)}
    return make_slices([position.get(adapter, -1) for adapter in rows], width, device)


def _slices_of(rows: Tensor, which: list[int], x: Tensor, out: int) -> Slices:
    width = (x.shape[-1] + out) * x.shape[1:-1].numel()
    return _slices(tuple(rows.tolist()), tuple(which), width, x.device)


@torch.library.custom_op("inlay::add_routed", mutates_args=())
def add_routed(
    y: Tensor, x: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], rows: Tensor, which: list[int]
) -> Tensor:
    """Return a layer's output with each sample's own update.

    Args:
        y: (samples, *, out), without updates.
        x: (samples, *, in), in the dtype of the factors.
        A: (r, in) each.
        B: (out, r) each.
        scales: one for each update.
        rows: (samples,) a number for the adapter of each sample, on the CPU.
        which: the number of the adapter of each update; samples of any other get none.
    """
    none = [None] * len(A)
    updates = Updates(A, B, none, scales, [0.0] * len(A), x.dtype)
    with torch.no_grad():
        return add_updates(y, x, _slices_of(rows, which, x, y.shape[-1]), updates)


@add_routed.register_fake
def _(
    y: Tensor, x: Tensor, A: list[Tensor], B: list[Tensor], scales: list[float], rows: Tensor, which: list[int]
) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("inlay::add_routed_backward", mutates_args=())
def add_routed_backward(
    dy: Tensor,
    x: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    scales: list[float],
    rows: Tensor,
    which: list[int],
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, of each A and of each B; empty tensors for what ``needs`` leaves out."""
    slices = _slices_of(rows, which, x, dy.shape[-1])
    with torch.no_grad():
        dx = x.new_zeros(x.shape) if needs[0] else None
        factors, bits = [scales[k] for k, _, _ in slices.pieces], [None] * len(slices.pieces)
        dx, found = backward_pieces(
            slices.sort(dy),
            slices.sort(x),
            dx,
            slices,
            A,
            B,
            [False] * len(A),
            scales,
            factors,
            x.dtype,
            needs[1:],
            [],
            bits,
        )
        wanted = [None if dx is None else slices.unsort(dx), *found]
        return [
            tensor.new_empty(0) if not need else torch.zeros_like(tensor) if grad is None else grad.to(tensor.dtype)
            for need, grad, tensor in zip(needs, wanted, (x, *A, *B), strict=True)
        ]


@add_routed_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    A: list[Tensor],
    B: list[Tensor],
    scales: list[float],
    rows: Tensor,
    which: list[int],
    needs: list[bool],
) -> list[Tensor]:
    return [
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)
        for need, tensor in zip(needs, (x, *A, *B), strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, x, A, B, ctx.scales, rows, ctx.which = inputs
    ctx.count = len(A)
    ctx.save_for_backward(x, rows, *A, *B)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, rows, *factors = ctx.saved_tensors
    A, B = factors[: ctx.count], factors[ctx.count :]
    needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[2], *ctx.needs_input_grad[3]]
    found = add_routed_backward(dy.contiguous(), x, A, B, ctx.scales, rows, ctx.which, needs)
    grads = [grad if need else None for need, grad in zip(needs, found, strict=True)]
    return dy, grads[0], grads[1 : 1 + ctx.count], grads[1 + ctx.count :], None, None, None


add_routed.register_autograd(_backward, setup_context=_save)
