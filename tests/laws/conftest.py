"""Gives each law its cells: a cover of pairs, or every cell where INLAY_ALL_CELLS is set (``make test-all``)."""

from __future__ import annotations

import zlib

import cells
import pytest
from cell_cover import family_cover, pair_cover

# A test meets every one in so many pairs of method and kind; together the tests of all laws meet each of them several
# times. The tests marked ``every_pair`` meet all by themselves.
SHARE = 9


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A law's module says ``STORAGES`` (which it runs over) and ``SLOW = True`` (a cover by family is enough)."""
    if "cell" not in metafunc.fixturenames:
        return
    storages = getattr(metafunc.module, "STORAGES", tuple(cells.STORAGES))
    start = zlib.crc32(metafunc.function.__name__.encode())
    if cells.ALL_CELLS:
        chosen = list(cells.every_cell(storages))
    elif getattr(metafunc.module, "SLOW", False):
        chosen = family_cover(storages, start)
    else:
        whole = metafunc.definition.get_closest_marker("every_pair") is not None
        chosen = pair_cover(storages, start, share=1 if whole else SHARE)
    metafunc.parametrize("cell", chosen, ids=str)
