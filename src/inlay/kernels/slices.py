"""Where the samples of each adapter stand in a batch, and whether to sort it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Slices", "make_slices"]

# What one more slice costs, in elements of x and y copied instead: its calls, and reading factors again.
_SLICE = 12_000


class Slices:
    """Where the samples of each adapter stand.

    Attributes:
        pieces: (update, first sample, sample behind the last), without overlap and in rising order.
        owners: the update of each piece.
        order: (samples,) the sorted batch, those that no update serves last; None where nothing is sorted.
        inverse: brings a sorted batch back into its order.
        sizes: samples in each piece and in each gap, in rising order, for ``Tensor.split``.
        places: position in ``sizes`` of each piece.
    """

    __slots__ = ("inverse", "order", "owners", "pieces", "places", "sizes")

    def __init__(
        self, pieces: Sequence[tuple[int, int, int]], total: int, order: list[int] | None = None, device: Any = None
    ) -> None:
        self.pieces = tuple(pieces)
        self.order: Tensor | None = None
        self.inverse: Tensor | None = None
        if order is not None:
            inverse = [0] * len(order)
            for place, sample in enumerate(order):
                inverse[sample] = place
            self.order, self.inverse = torch.tensor([order, inverse], device=device).unbind()
        self.owners = [update for update, _, _ in pieces]
        self.sizes: list[int] = []
        self.places: list[int] = []
        end = 0
        for _, start, stop in self.pieces:
            if start > end:
                self.sizes.append(start - end)
            self.places.append(len(self.sizes))
            self.sizes.append(stop - start)
            end = stop
        if total > end:
            self.sizes.append(total - end)

    def cut(self, tensor: Tensor, rows: int) -> list[Tensor]:
        """Return the rows of each piece of a tensor (samples * rows, n), as views."""
        sizes = [size * rows for size in self.sizes] if rows != 1 else self.sizes
        parts = torch.split_with_sizes(tensor, sizes)
        return [parts[place] for place in self.places]

    def sort(self, tensor: Tensor) -> Tensor:
        """Return (samples, *, n) in the order of the pieces."""
        return tensor if self.order is None else tensor.index_select(0, self.order)

    def unsort(self, tensor: Tensor) -> Tensor:
        """Undo :meth:`sort`."""
        return tensor if self.inverse is None else tensor.index_select(0, self.inverse)


def make_slices(updates: Sequence[int], width: int, device: torch.device) -> Slices:
    """Find the pieces of a batch, and decide whether to sort it.

    Args:
        updates: for each sample the position of its update, or -1 for none.
        width: elements that a sample has in x and y together.
        device: where the samples are.
    """
    runs: list[tuple[int, int, int]] = []
    start = 0
    for i in range(1, len(updates) + 1):
        if i == len(updates) or updates[i] != updates[start]:
            if updates[start] >= 0:
                runs.append((updates[start], start, i))
            start = i
    groups: dict[int, list[int]] = {}
    for update, first, last in runs:
        groups.setdefault(update, []).extend(range(first, last))
    if (len(runs) - len(groups)) * _SLICE <= len(updates) * width:
        return Slices(runs, len(updates))
    pieces, end = [], 0
    for update, rows in groups.items():
        pieces.append((update, end, end + len(rows)))
        end += len(rows)
    order = [row for rows in groups.values() for row in rows]
    order += [row for row, update in enumerate(updates) if update < 0]
    return Slices(pieces, len(updates), order, device)
