"""L2: a fresh adapter changes nothing, unless its config says so."""

from __future__ import annotations

from cells import Cell

from inlay.testing.laws import forward


def test_fresh_adapter_changes_nothing(cell: Cell) -> None:
    forward.fresh_adapter_changes_nothing(cell)


def test_the_same_seed_gives_the_same_adapter(cell: Cell) -> None:
    forward.same_seed_gives_the_same_adapter(cell)


def test_switched_off_it_is_the_base_bitwise(cell: Cell) -> None:
    forward.switched_off_it_is_the_base(cell)
