"""Showing how far a long loop over layers is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

__all__ = ["shown"]

T = TypeVar("T")


def shown(work: Sequence[T], what: str, unit: str = "layer", on: bool = True) -> Iterable[T]:
    """Iterate over ``work`` and show the progress: a bar where tqdm is installed, otherwise a line for each item.

    Args:
        work: what is to be done.
        what: the bar's title.
        unit: what one item is.
        on: False shows nothing.
    """
    if not on:
        return work
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _counted(work, what, unit)
    return tqdm(work, desc=what, unit=unit)


def _counted(work: Sequence[T], what: str, unit: str) -> Iterable[T]:
    for number, item in enumerate(work, 1):
        print(f"{what}: {unit} {number} of {len(work)}", flush=True)
        yield item
