"""Which rows of a batch each adapter serves: found once for a forward, used by all of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inlay.kernels.slices import Slices, make_slices
from inlay.kernels.stacked import Seats, make_seats

if TYPE_CHECKING:
    from inlay.kernels.stacked import Stack

__all__ = ["Routes"]


class Routes:
    """The adapters of one batch, by sample.

    It hangs on the ``Call`` of the forward, so a recomputed gradient checkpoint finds it again, and what it holds ends
    with the call. Threads may share it: whatever two of them find at once is equal.

    Attributes:
        names: the adapter of each sample, ``__base__`` for none.
        present: the different names, in alphabetic order, so that batches of the same adapters look alike.
        rows: (samples,) position in ``present``, on the CPU; traced code must not depend on its values. Plain, since
            older dynamo cannot trace the lock of a cached property.
        stacks: layer -> factors of its adapters side by side, or how often the layer ran without them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.present = tuple(sorted(set(self.names)))
        position = {name: i for i, name in enumerate(self.present)}
        self.rows = torch.tensor([position[name] for name in self.names])
        self.stacks: WeakKeyDictionary[Any, Stack | int] = WeakKeyDictionary()
        self._slices: dict[Any, Slices] = {}
        self._seats: dict[Any, Seats] = {}
        self._repeated: Routes | None = None

    @cached_property
    def sorted(self) -> tuple[list[tuple[str, int, int]], Tensor | None, Tensor | None]:
        """(adapter, its first sample, the one behind its last) in the sorted batch; the order that sorts it, and the
        one that undoes it, both on the CPU, None where it is sorted as it comes."""
        order = sorted(range(len(self.names)), key=self.names.__getitem__)
        groups, end = [], 0
        for name in self.present:
            start, end = end, end + self.names.count(name)
            groups.append((name, start, end))
        if order == list(range(len(order))):
            return groups, None, None
        inverse = sorted(range(len(order)), key=order.__getitem__)
        both = torch.tensor([order, inverse])
        return groups, both[0], both[1]

    def of(self, names: tuple[str, ...]) -> Routes:
        """Return the routes of a batch of the same adapters in which every sample stands several times."""
        if len(names) == len(self.names):  # traced code must not compare names, which would become constants of it
            return self
        if self._repeated is None or self._repeated.names != names:
            self._repeated = Routes(names)
        return self._repeated

    def slices(self, here: tuple[str, ...], width: int, device: torch.device) -> Slices:
        """Return the pieces of the batch that the adapters ``here`` serve, numbered as they stand there.

        Args:
            here: the adapters that a layer has, some of ``present``.
            width: elements that a sample has in the layer's input and output together.
            device: where the samples are.
        """
        key = (here, width, device)
        found = self._slices.get(key)
        if found is None:
            found = self._slices[key] = make_slices(self._updates(here), width, device)
        return found

    def seats(self, here: tuple[str, ...], device: torch.device) -> Seats:
        """Return where each sample that an adapter of ``here`` serves sits in groups of equal size."""
        key = (here, device)
        found = self._seats.get(key)
        if found is None:
            found = self._seats[key] = make_seats(self._updates(here), len(here), device)
        return found

    def _updates(self, here: tuple[str, ...]) -> list[int]:
        position = {name: i for i, name in enumerate(here)}
        return [position.get(name, -1) for name in self.names]

    def __deepcopy__(self, memo: Any) -> Routes:
        return Routes(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return Routes, (self.names,)
