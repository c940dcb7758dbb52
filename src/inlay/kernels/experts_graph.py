"""The product of an expert bank as operators that a compiled graph does not look into.

Which rows an expert has is data, and ``grouped_mm`` can be traced in bfloat16 alone.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from inlay.kernels.experts_product import gradients, products
from inlay.kernels.experts_route import Segments

__all__ = ["opaque_product"]

MaybeTensor = Optional[Tensor]  # noqa: UP045  read by torch when it makes the operator's schema


@torch.library.custom_op("inlay::bank_product", mutates_args=())
def opaque_product(
    x: Tensor, dropped: MaybeTensor, weight: MaybeTensor, A: MaybeTensor, B: MaybeTensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return y and t of ``experts_product.products``; ``offsets`` (experts,) is where each expert's rows end."""
    return products(x, x if dropped is None else dropped, weight, A, B, _segments(offsets))


@opaque_product.register_fake
def _(
    x: Tensor, dropped: MaybeTensor, weight: MaybeTensor, A: MaybeTensor, B: MaybeTensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    width = (B if weight is None else weight).shape[2]  # type: ignore[union-attr]
    return x.new_empty(x.shape[0], width), x.new_empty(0) if A is None else x.new_empty(x.shape[0], A.shape[1])


@torch.library.custom_op("inlay::bank_product_backward", mutates_args=())
def opaque_gradients(
    grad: Tensor,
    x: Tensor,
    dropped: MaybeTensor,
    weight: MaybeTensor,
    A: MaybeTensor,
    B: MaybeTensor,
    t: Tensor,
    offsets: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of x, dropped, A and B; an empty tensor for one that is not needed."""
    read = x if dropped is None else dropped
    found = gradients(grad, read, weight, A, B, t, _segments(offsets), tuple(needs), dropped is None)
    return [grad.new_empty(0) if d is None else d for d in found]


@opaque_gradients.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    dropped: MaybeTensor,
    weight: MaybeTensor,
    A: MaybeTensor,
    B: MaybeTensor,
    t: Tensor,
    offsets: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    likes = (x, x, A, B)
    return [
        grad.new_empty(like.shape) if need and like is not None else grad.new_empty(0)
        for like, need in zip(likes, needs, strict=True)
    ]


def _segments(offsets: Tensor) -> Segments:
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    return Segments(counts, offsets.device.type == "cpu")


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, dropped, weight, A, B, offsets = inputs
    ctx.save_for_backward(x, dropped, weight, A, B, output[1], offsets)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dropped, weight, A, B, t, offsets = ctx.saved_tensors
    out: list[Tensor | None] = [None] * 6
    if grad is None:
        return tuple(out)
    wanted = (0, 1, 3, 4)
    needs = [bool(ctx.needs_input_grad[i]) for i in wanted]
    found = opaque_gradients(grad, x, dropped, weight, A, B, t, offsets, needs)
    for i, need, gradient in zip(wanted, needs, found, strict=True):
        out[i] = gradient if need else None
    return tuple(out)


opaque_product.register_autograd(_differentiate, setup_context=_keep)
