"""Few cells that still hold every pair of what the cells are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cells import KINDS, METHODS, STORAGES, Cell, every_cell, works


def pair_cover(storages: Iterable[str] = STORAGES, start: int = 0) -> list[Cell]:
    """Return few cells with every pair (method, kind), (method, storage) and (kind, storage) among them.

    ``start`` turns the storages round, so that different laws meet different triples.
    """
    names = list(storages)
    chosen: list[Cell] = []
    for i, method in enumerate(METHODS):
        kinds = [kind for kind in KINDS if works(method, kind)]
        chosen += [Cell(method, kind, names[(start + i + j) % len(names)]) for j, kind in enumerate(kinds)]
    return _completed(chosen, list(every_cell(names)), lambda c: {(c.method, c.storage), (c.kind, c.storage)})


def family_cover(storages: Iterable[str] = ("plain_fp32",), start: int = 0) -> list[Cell]:
    """Return few cells with every method and every kind among them, for laws that take long."""
    cells = list(every_cell(storages))
    turn = start % max(1, len(cells))
    return _completed([], cells[turn:] + cells[:turn], lambda c: {("method", c.method), ("kind", c.kind)})


def _completed(chosen: list[Cell], cells: list[Cell], covers: Callable[[Cell], set[Any]]) -> list[Cell]:
    """Add cells, each time the one that covers most, until everything that any cell covers is covered."""
    missing = set().union(*map(covers, cells)) - set().union(*map(covers, chosen))
    while missing:
        best = max(cells, key=lambda cell: len(covers(cell) & missing))  # the first of equals
        chosen.append(best)
        missing -= covers(best)
    return chosen
