"""Switching the fast paths off, to compare with the generic way or for what only that can do."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["fast_paths", "fast_paths_on", "without_fast_paths"]


class _Local(threading.local):
    on = True
    detours = 0  # how much is under way in this thread that the shortest ways do not know of


fast_paths = _Local()


def fast_paths_on() -> bool:
    """Whether this thread may take fast paths."""
    return fast_paths.on


@contextmanager
def without_fast_paths() -> Iterator[None]:
    """Let every adapted layer take the generic way in this thread: plain operators that autograd differentiates."""
    before = fast_paths.on
    fast_paths.on = False
    fast_paths.detours += 1
    try:
        yield
    finally:
        fast_paths.on = before
        fast_paths.detours -= 1
