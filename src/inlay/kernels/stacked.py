"""Several adapters of one layer side by side, for many forwards of few rows each: decoding.

Two batched products serve all adapters at once. Stacking the factors costs as much as two forwards without a stack,
so it pays only where the same batch comes again, as every token of a generation does.

Shapes: A (adapters, r, in) and B (adapters, out, r) with the scale in it; smaller ranks are filled up with zeros, to a
multiple of 16 bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Seats", "Stack", "add_stacked", "make_seats"]


class Seats:
    """Groups of equal size, one for each adapter.

    Attributes:
        size: samples in a group.
        chosen: (groups * size,) the sample on each seat; a sample that has a seat already fills an empty one.
        samples: (n,) the samples that have a seat.
        taken: (n,) their seats.
        plain: whether the seats are the batch itself, in its order.
    """

    __slots__ = ("chosen", "plain", "samples", "size", "taken", "waste")

    def __init__(self, groups: Sequence[Sequence[int]], total: int, device: torch.device) -> None:
        self.size = max(map(len, groups))
        chosen = [row for group in groups for row in (*group, *[group[0]] * (self.size - len(group)))]
        samples = [row for group in groups for row in group]
        taken = [i * self.size + j for i, group in enumerate(groups) for j in range(len(group))]
        self.plain = chosen == list(range(total))
        self.waste = len(chosen) / len(samples)
        self.chosen = torch.tensor(chosen, device=device)
        self.samples = torch.tensor(samples, device=device)
        self.taken = torch.tensor(taken, device=device)


def make_seats(updates: Sequence[int], count: int, device: torch.device) -> Seats:
    """Seat a batch; ``updates`` says for each sample which of ``count`` adapters serves it, or -1 for none."""
    groups: list[list[int]] = [[] for _ in range(count)]
    for sample, update in enumerate(updates):
        if update >= 0:
            groups[update].append(sample)
    return Seats(groups, len(updates), device)


class Stack:
    """Copies of the factors of several adapters, and of what they were copied from.

    It holds its sources weakly and compares them, their versions and their scales before each use. So it notices what
    ``load_state_dict(assign=True)``, ``.to()``, an optimiser or a swap put in their place; not what is written through
    ``.data``, which moves no version. Therefore a stack lives no longer than one call, and is no cache of the layer.
    """

    __slots__ = ("A", "B", "_key", "dtype")

    def __init__(
        self, A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype, key: Any
    ) -> None:
        step = max(16 // dtype.itemsize, 1)
        rank = -(-max(a.shape[0] for a in A) // step) * step
        self.dtype = dtype
        first = A[0]
        self.A = torch.empty((len(A), rank, first.shape[1]), dtype=dtype, device=first.device)
        self.B = torch.empty((len(A), B[0].shape[0], rank), dtype=dtype, device=first.device)
        for i, (a, b, scale) in enumerate(zip(A, B, scales, strict=True)):
            r = a.shape[0]
            self.A[i, :r] = a
            self.B[i, :, :r] = b
            self.B[i, :, :r] *= scale
            self.A[i, r:] = 0
            self.B[i, :, r:] = 0
        self._key = key

    @staticmethod
    def key(A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float]) -> list[Any] | None:
        """Return what a stack depends on, or None where changes could not be seen."""
        if any(tensor.is_inference() for tensor in (*A, *B)):
            return None
        return [
            (weakref.ref(a), a._version, weakref.ref(b), b._version, s) for a, b, s in zip(A, B, scales, strict=True)
        ]

    def holds(self, A: Sequence[Tensor], B: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> bool:
        """Whether it is a stack of these factors, as they are now."""
        if dtype != self.dtype or len(self._key) != len(A):
            return False
        return all(
            held[0]() is a and held[1] == a._version and held[2]() is b and held[3] == b._version and held[4] == s
            for held, a, b, s in zip(self._key, A, B, scales, strict=True)
        )

    def add(self, x: Tensor, y: Tensor, seats: Seats) -> None:
        """Add each sample's update to its row of y, in place.

        Args:
            x: (samples, rows, in).
            y: (samples, rows, out), contiguous.
            seats: who sits where.
        """
        count, rows, out = self.A.shape[0], y.shape[1], y.shape[2]
        seated = x if seats.plain else x.index_select(0, seats.chosen)
        t = torch.bmm(seated.reshape(count, -1, x.shape[-1]).to(self.dtype), self.A.mT)
        if seats.plain and y.dtype == self.dtype:
            y.view(count, -1, out).baddbmm_(t, self.B.mT)
            return
        update = torch.bmm(t, self.B.mT).view(-1, rows, out)
        if seats.plain:
            y.copy_(y + update)
        elif y.dtype == self.dtype:
            y.index_add_(0, seats.samples, update.index_select(0, seats.taken))
        else:
            sums = y.index_select(0, seats.samples) + update.index_select(0, seats.taken)
            y.index_copy_(0, seats.samples, sums.to(y.dtype))


def add_stacked(base: Tensor | tuple[Tensor, Tensor, Tensor | None], x: Tensor, stack: Stack, seats: Seats) -> Tensor:
    """Return a layer's output with each sample's update, without gradients; see ``kernels.grouped.add_updates``."""
    with torch.no_grad():
        if isinstance(base, Tensor):
            y = base.clone(memory_format=torch.contiguous_format)
        else:
            y = torch.nn.functional.linear(*base)
        if y.numel():
            samples = x.shape[0]
            stack.add(x.reshape(samples, -1, x.shape[-1]), y.view(samples, -1, y.shape[-1]), seats)
    return y
