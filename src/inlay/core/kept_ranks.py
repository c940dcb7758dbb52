"""Which ranks of each layer are left, where training takes some away: ``<layer>.lora_E`` -> one bool for each rank.

A pattern speaks of all ranks that a layer had at first. ``own`` is the one that the layer's tensors were made for: a
layer that was loaded after ranks were taken away has only those that were left.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Pattern", "all_ranks", "left_of", "rows_left", "with_ranks", "without_ranks"]

Pattern = Mapping[str, list[bool]]

_AXES = {"lora_A": 0, "lora_E": 0, "lora_B": 1}


def left_of(pattern: Pattern | None, name: str) -> list[bool] | None:
    """Return what a pattern says of a layer; its keys may have an adapter's name at the end."""
    start = f"{name}.lora_E"
    return next((left for key, left in (pattern or {}).items() if key == start or key.startswith(f"{start}.")), None)


def rows_left(pattern: Pattern | None, own: Pattern | None, name: str) -> list[bool] | None:
    """Say of the ranks that a layer's tensors have which are left, None where it is not said."""
    left, here = left_of(pattern, name), left_of(own, name)
    if left is None or here is None:
        return left
    return [one for one, held in zip(left, here, strict=True) if held]


def all_ranks(own: Pattern | None, name: str, left: list[bool]) -> list[bool]:
    """Say it of all the ranks that a layer had at first, given it of those that its tensors have."""
    here, rest = left_of(own, name), iter(left)
    return left if here is None else [held and next(rest) for held in here]


def without_ranks(pattern: Pattern | None, own: Pattern | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with those ranks only that are left."""
    found = {}
    for key, tensor in tensors.items():
        mask, axis = _said(pattern, own, key)
        whole = mask is None or tensor.shape[axis] != len(mask)
        found[key] = tensor if mask is None or whole else tensor[_index(mask, axis)]
    return found


def with_ranks(pattern: Pattern | None, own: Pattern | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with zeros for the ranks that were taken away, for layers that have them still."""
    found = {}
    for key, tensor in tensors.items():
        mask, axis = _said(pattern, own, key)
        found[key] = tensor
        if mask is not None and tensor.shape[axis] == sum(mask) < len(mask):
            shape = [len(mask) if i == axis else size for i, size in enumerate(tensor.shape)]
            found[key] = tensor.new_zeros(shape)
            found[key][_index(mask, axis)] = tensor
    return found


def _said(pattern: Pattern | None, own: Pattern | None, key: str) -> tuple[list[bool] | None, int]:
    name, _, part = key.removeprefix("base_model.model.").rpartition(".")
    axis = _AXES.get(part)
    return (None, 0) if axis is None else (rows_left(pattern, own, name), axis)


def _index(mask: list[bool], axis: int) -> tuple[Any, ...]:
    return (slice(None),) * axis + (torch.tensor(mask, dtype=torch.bool),)
