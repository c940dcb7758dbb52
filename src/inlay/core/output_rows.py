"""Some output rows of a layer: taking them, putting them back, and updates of nothing but them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from inlay.core.affine import Delta, Dense, LowRank
from inlay.core.structured import Structured

__all__ = ["Rows", "RowsOf", "put_rows", "spread", "spread_rows", "take_rows"]

Rows = tuple[tuple[int, int], ...]  # [start, stop) of each range, in ascending order


def take_rows(rows: Rows, whole: Tensor, axis: int = 0) -> Tensor:
    """Return the slice's part of a tensor, whose ``axis`` has the rows of the whole; a view where it is one range."""
    parts = [whole.narrow(axis, start, stop - start) for start, stop in rows]
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def put_rows(rows: Rows, whole: Tensor, part: Tensor, axis: int = 0) -> Tensor:
    """Return the whole with the slice's rows replaced, in the wider dtype of the two."""
    pieces: list[Tensor] = []
    at = 0
    for (start, stop), own in zip(rows, part.split([stop - start for start, stop in rows], axis), strict=True):
        pieces += [whole.narrow(axis, at, start - at), own]
        at = stop
    pieces.append(whole.narrow(axis, at, whole.shape[axis] - at))
    return torch.cat(pieces, axis)


def spread_rows(rows: Rows, out: int, tensor: Tensor, axis: int = -2) -> Tensor:
    """Put the rows of a tensor where a slice has them, between rows of zeros.

    Args:
        rows: ranges of the whole, in ascending order.
        out: how many rows the whole has.
        tensor: its ``axis`` has the rows of the slice.
    """
    own = tensor.split([stop - start for start, stop in rows], axis)

    def gap(size: int) -> Iterator[Tensor]:
        if size:
            shape = list(tensor.shape)
            shape[axis] = size
            yield tensor.new_zeros(shape)

    parts: list[Tensor] = []
    at = 0
    for (start, stop), part in zip(rows, own, strict=True):
        parts += [*gap(start - at), part]
        at = stop
    return torch.cat([*parts, *gap(out - at)], axis)


class RowsOf(Structured):
    """A structured update of some rows; the others stay as they are.

    Args:
        part: the update of those rows, unscaled or not.
        rows: which they are.
        out: how many rows the layer has.
    """

    factors = ()

    def __init__(self, part: Structured, rows: Rows, out: int) -> None:
        self.part = part
        self.rows = rows
        self.out = out
        self.bias = None if part.bias is None else spread_rows(rows, out, part.bias * part.scale, -1)
        self.scale = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    def to(self, dtype: torch.dtype) -> Structured:
        other = copy.copy(self)
        other.part = self.part.to(dtype)
        return other

    def matrix(self) -> Tensor:
        return spread_rows(self.rows, self.out, self.part.dense())


def spread(rows: Rows, out: int, delta: Delta) -> Delta:
    """Return an update of some rows as one of the layer that has ``out`` rows."""
    if isinstance(delta, Structured):
        return RowsOf(delta, rows, out)
    bias = None if delta.bias is None else spread_rows(rows, out, delta.bias, -1)
    if isinstance(delta, LowRank):
        return LowRank(spread_rows(rows, out, delta.B), delta.A, bias).scaled(delta.scale)
    return Dense(spread_rows(rows, out, delta.dense()), None if bias is None else bias * delta.scale)
