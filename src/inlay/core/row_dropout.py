"""Leaving rows of an update out of a training forward (``rank_dropout``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.core.affine import Delta, Dense

if TYPE_CHECKING:
    from inlay.core.inner import Inner

__all__ = ["with_some_rows"]


def with_some_rows(x: Tensor, inner: Inner, update: Delta, probability: float, rescale: bool) -> Tensor:
    """Return the output of what is below with some rows of an update added to it.

    Args:
        x: the layer's input.
        inner: what is below.
        update: with its scale.
        probability: chance of a row to be left out.
        rescale: divide the rows that stay by their share, so that the update keeps its size on average.
    """
    y = inner(x)
    weight = update.dense()
    kept = (torch.rand_like(weight[..., :1]) > probability).to(weight.dtype)
    if rescale:
        kept = kept / kept.mean().clamp_min(1 / kept.numel())  # no row kept: no update, and no division by zero
    return (y + inner.apply(x, Dense(weight * kept))).to(y.dtype)
