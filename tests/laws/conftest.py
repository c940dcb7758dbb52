"""Gives each law its cells: a cover of pairs, or every cell where INLAY_ALL_CELLS is set (``make test-all``)."""

from __future__ import annotations

import cells
import pytest
from cell_cover import family_cover, pair_cover


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A law's module says ``STORAGES`` (which it runs over) and ``SLOW = True`` (a cover by family is enough)."""
    if "cell" not in metafunc.fixturenames:
        return
    module = metafunc.module
    storages = getattr(module, "STORAGES", tuple(cells.STORAGES))
    start = int(module.__name__.split("_")[1].lstrip("l"))
    if cells.ALL_CELLS:
        chosen = list(cells.every_cell(storages))
    elif getattr(module, "SLOW", False):
        chosen = family_cover(storages, start)
    else:
        chosen = pair_cover(storages, start)
    metafunc.parametrize("cell", chosen, ids=str)
