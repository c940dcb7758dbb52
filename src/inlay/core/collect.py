"""Python's collection of cycles, held back while many modules are made."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["uncollected"]

P = ParamSpec("P")
T = TypeVar("T")

_lock = threading.Lock()
_running = 0
_was_on = False
_set_apart = False  # whether somebody has frozen objects, which are not ours to mix with others


def uncollected(function: Callable[P, T]) -> Callable[P, T]:
    """Let a function run without the collector, which would look at every module of the model again and again.

    Its passes come with the number of new objects, and cost as much as there are old ones: adding the hundredth
    adapter would take several times as long as adding the first. The new objects are counted among the old ones at
    once, because modules are there to stay; what is garbage by then is found by the next full pass.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        global _running, _was_on, _set_apart
        with _lock:
            if not _running:
                _was_on = gc.isenabled()
                gc.disable()
            _running += 1
        try:
            return function(*args, **kwargs)
        finally:
            with _lock:
                _running -= 1
                if not _running and _was_on:
                    _set_apart = _set_apart or gc.get_freeze_count() > 0  # which counts them one by one
                    if not _set_apart:
                        gc.freeze()
                        gc.unfreeze()  # into the oldest generation, without a pass over it
                    gc.enable()

    return run
