"""Few cells that still hold every pair of what the cells are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cells import KINDS, METHODS, STORAGES, Cell, every_cell, family, works


def pair_cover(storages: Iterable[str] = STORAGES, start: int = 0, share: int = 1) -> list[Cell]:
    """Return few cells with every pair (method, kind), (method, storage) and (kind, storage) among them.

    With a ``share``, every method is there with every ``share``-th of its kinds, in one storage each: which ones,
    ``start`` says, so that tests whose starts follow each other meet all pairs between them, and different triples.
    """
    names = list(storages)
    chosen: list[Cell] = []
    for i, method in enumerate(METHODS):
        kinds = [kind for kind in KINDS if works(method, kind)]
        turns = [(i + j + start) for j in range(len(kinds))]
        chosen += [
            Cell(method, kind, names[(turn // share) % len(names)])
            for kind, turn in zip(kinds, turns, strict=True)
            if turn % share == 0
        ]
    return _completed(chosen, names) if share == 1 else chosen


def family_cover(storages: Iterable[str] = ("plain_fp32",), start: int = 0) -> list[Cell]:
    """Return few cells with every family of methods and every kind among them, for laws that take long."""
    cells = list(every_cell(storages))
    turn = start % max(1, len(cells))
    return _greedy(cells[turn:] + cells[:turn], lambda c: {("family", family(c.method)), ("kind", c.kind)})


def _completed(chosen: list[Cell], storages: list[str]) -> list[Cell]:
    """Add cells until every method and every kind is there with every storage."""
    have = {(c.method, c.storage) for c in chosen}
    lacking = [(m, s) for m in METHODS for s in storages if (m, s) not in have]
    for turn, (method, storage) in enumerate(lacking):
        kinds = [kind for kind in KINDS if works(method, kind)]
        used = {cell.kind for cell in chosen if cell.method == method}
        # a kind that the method has not met, if there is one
        order = kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)] if kinds else []
        chosen += [Cell(method, kind, storage) for kind in sorted(order, key=used.__contains__)[:1]]
    have = {(c.kind, c.storage) for c in chosen}
    lacking = [(k, s) for k in KINDS for s in storages if (k, s) not in have]
    for turn, (kind, storage) in enumerate(lacking):
        methods = [method for method in METHODS if works(method, kind)]
        chosen += [Cell(methods[turn % len(methods)], kind, storage)] if methods else []
    return chosen


def _greedy(cells: list[Cell], covers: Callable[[Cell], set[Any]]) -> list[Cell]:
    """Choose cells, each time the one that covers most, until everything that any cell covers is covered."""
    missing = set().union(*map(covers, cells))
    chosen: list[Cell] = []
    while missing:
        best = max(cells, key=lambda cell: len(covers(cell) & missing))  # the first of equals
        chosen.append(best)
        missing -= covers(best)
    return chosen
