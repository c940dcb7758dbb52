"""Values that follow from tensors, kept for as long as none of them changes.

What follows from frozen base weights (:func:`row_norms`) is always kept. What follows from an adapter's tensors is
kept only when someone switches it on, because code that writes through ``tensor.data``, which nothing notices, is usual
there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

__all__ = ["is_remembering", "remember", "remembered", "row_norms"]

_on = False
_norms: Any = WeakIdKeyDictionary()  # weight -> (key, its squared row norms)
_kept: Any = WeakIdKeyDictionary()  # first parameter -> (what it was computed from, value)


def is_remembering() -> bool:
    """Whether values are kept."""
    return _on


def remember(on: bool) -> None:
    """Switch keeping on or off for this process; off forgets everything."""
    global _on
    _on = on
    if not on:
        _kept.clear()


def remembered(compute: Callable[[], Tensor], *sources: Tensor | float) -> Tensor:
    """Return ``compute()``, or what it returned when its sources were as they are now.

    A source counts as changed when its memory, dtype or torch's version counter is another one; writes through
    ``tensor.data`` move none of them and are not seen. Only parameters, and views of them, are recognised again: with
    any other tensor among the sources nothing is kept.

    Args:
        compute: gives a tensor without gradient.
        sources: what it depends on; the first is a parameter, and the value is dropped with it.
    """
    return _held_or(compute, _kept, sources) if _on and not torch.compiler.is_compiling() else compute()


@torch.no_grad()
def row_norms(weight: Tensor) -> Tensor:
    """Return the squared norm of every row of a weight (*, out, in): (*, out), float32, or float64 for such a weight.

    They are kept for a parameter, or a view of one, until torch's version counter, its memory or its dtype is another.
    """

    def compute() -> Tensor:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.linalg.vector_norm(weight.detach(), dim=-1, dtype=dtype).square_()

    return compute() if torch.compiler.is_compiling() else _held_or(compute, _norms, (weight,))


def _held_or(compute: Callable[[], Tensor], store: Any, sources: tuple[Tensor | float, ...]) -> Tensor:
    key = _key(sources)
    if key is None:
        return compute()
    first = _owner(sources[0])
    held = store.get(first)
    if held is not None and held[0] == key:
        found: Tensor = held[1]
        return found
    value = compute()
    if not value.requires_grad and not value.is_inference():
        store[first] = (key, value)
    return value


def _owner(source: Any) -> Any:
    base = source._base if isinstance(source, Tensor) else None
    return source if base is None else base


def _key(sources: tuple[Tensor | float, ...]) -> tuple[Any, ...] | None:
    found: list[Any] = []
    for source in sources:
        if not isinstance(source, Tensor):
            found.append(source)
            continue
        owner = _owner(source)
        scalar = source.dim() == 0 and source.device.type == "cpu"
        if scalar:
            found.append(source.item())
        elif isinstance(owner, nn.Parameter) and type(owner) is nn.Parameter and not owner.is_inference():
            found.append((WeakIdRef(owner), owner._version, source.data_ptr(), source.dtype))
        else:
            return None
    return tuple(found)
