"""Rows of tokens sorted by expert, there and back.

Each of T tokens goes to k experts, so there are S = T * k rows. They are sorted by expert once for a forward; the
banks of a module then multiply contiguous segments of rows, one segment an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["Route", "Segments"]


class Segments:
    """Where the rows of each expert begin and end.

    Attributes:
        offsets: (experts,) int32, where each expert's rows end.
        experts: how many there are.
        lengths: rows of each expert that has any, and
        used: which experts those are; both None where asking would stop an accelerator or break a graph.
    """

    __slots__ = ("experts", "lengths", "offsets", "used")

    def __init__(self, counts: Tensor, ask: bool) -> None:
        """Make segments from (experts,) counts of rows; ``ask`` brings them to the host."""
        self.experts = counts.shape[0]
        self.offsets = counts.cumsum(0, dtype=torch.int32)
        self.lengths: list[int] | None = None
        self.used: list[int] | None = None
        if ask:
            found = counts.tolist()
            self.used = [expert for expert, count in enumerate(found) if count]
            self.lengths = [found[expert] for expert in self.used]

    @property
    def few(self) -> bool:
        """Whether it is known that less than half of the experts have rows, so that the others need not be touched."""
        return self.used is not None and len(self.used) * 2 < self.experts

    def on_host(self) -> tuple[list[int], list[int]]:
        """Return ``lengths`` and ``used``; waits for an accelerator."""
        if self.lengths is None or self.used is None:
            ends = self.offsets.tolist()
            counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
            self.used = [expert for expert, count in enumerate(counts) if count]
            self.lengths = [counts[expert] for expert in self.used]
        return self.lengths, self.used


class Route:
    """Which rows go to which expert.

    Attributes:
        segments: the rows of each expert.
        chosen: k, or 0 where the rows came sorted and stay so.
        tokens: (S,) the token of each sorted row.
        order: (S,) the unsorted row of each sorted row; unsorted rows are (token, choice).
        inverse: (S,) the sorted row of each unsorted row.
        experts: (S,) the expert of each sorted row.
    """

    __slots__ = ("chosen", "experts", "inverse", "order", "segments", "tokens")

    def __init__(self, index: Tensor, experts: int) -> None:
        """Sort rows by the experts, (T, k), that the router chose for each token."""
        self.chosen = index.shape[-1]
        flat = index.reshape(-1)
        self.experts, self.order = torch.sort(flat, stable=True)
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(flat.shape[0], device=flat.device)
        self.tokens = self.order // self.chosen
        ask = flat.device.type == "cpu" and not torch.compiler.is_compiling()
        if ask:
            counts = torch.bincount(flat, minlength=experts)[:experts]  # an index beyond them means no expert
        else:  # a count that neither waits for an accelerator nor depends on data in its shape
            counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
        self.segments = Segments(counts, ask)

    @classmethod
    def even(cls, rows: int, experts: int, device: torch.device) -> Route:
        """Return the route of rows that come sorted, the same number for each expert."""
        self = object.__new__(cls)
        self.chosen = 0
        self.segments = Segments(torch.full((experts,), rows // experts, device=device), device.type == "cpu")
        return self

    def sorted(self, tensor: Tensor) -> Tensor:
        """Sort (S, ...), given as unsorted rows."""
        found: Tensor = _Moved.apply(tensor, self.order, self.inverse)
        return found

    def spread(self, x: Tensor) -> Tensor:
        """Return the token (T, n) of each sorted row, (S, n)."""
        found: Tensor = _Moved.apply(x, self.tokens, self.inverse.view(-1, self.chosen))
        return found

    def summed(self, rows: Tensor) -> Tensor:
        """Sum the sorted rows (S, n) of each token, (T, n); sums of half precision are taken in float32."""
        found: Tensor = _Moved.apply(rows, self.inverse.view(-1, self.chosen), self.tokens)
        return found


def sum_rows(rows: Tensor, index: Tensor) -> Tensor:
    """Sum rows (S, n) over ``index`` (T, k): (T, n)."""
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        # one pass where gathering and summing take three; sums in float32 inside
        return torch.embedding_bag(rows, index.reshape(-1), _bags(index), False, 0)[0]
    return rows.index_select(0, index.reshape(-1)).view(*index.shape, -1).sum(1)


def _bags(index: Tensor) -> Tensor:
    return torch.arange(0, index.numel(), index.shape[1], device=index.device)


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows of x at an index (S,), or their sums over one of (T, k)."""
    return x.index_select(0, index) if index.dim() == 1 else sum_rows(x, index)


class _Moved(torch.autograd.Function):
    """Rows at an index; ``back`` is the index that takes the gradient of these rows to where they came from.

    That is the same operation again, so gradients of gradients come for nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(index, back)
        return _rows_at(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, back = ctx.saved_tensors
        return _Moved.apply(grad, back, index), None, None
