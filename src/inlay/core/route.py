"""The generic way to serve several adapters in one batch: a sub-batch each, and the rows put back in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inlay.errors import RoutingError
from inlay.parallel.tensors import beside

__all__ = ["split_rows"]


def split_rows(
    where: str,
    names: tuple[str, ...],
    run: Callable[[str, tuple[Any, ...], dict[str, Any]], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axis: int = 0,
) -> Any:
    """Call ``run(name, args, kwargs)`` once per adapter on its own rows of every batched tensor.

    A tensor is batched if its ``axis`` has ``len(names)`` rows; one row is repeated first, because position
    embeddings come so.

    Raises:
        RoutingError: the first tensor has neither as many rows as names nor one.
    """
    batch = len(names)
    x = args[0] if args else next(iter(kwargs.values()))
    if x.shape[axis] not in (batch, 1):
        raise RoutingError(
            f"adapters were chosen for {batch} samples, but a {where} layer received {x.shape[axis]} rows "
            f"(shape {tuple(x.shape)}): the model does not keep one row per sample there"
        )
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    order = [row for group in rows.values() for row in group]

    def part(value: Any, index: Tensor) -> Any:
        if isinstance(value, Tensor) and value.dim() > axis:
            if value.shape[axis] == batch:
                return value.index_select(axis, beside(index, value))
            if value is x:
                return value.expand(*value.shape[:axis], len(index), *value.shape[axis + 1 :])
        return value

    outputs = []
    for name, group in rows.items():
        index = torch.tensor(group, device=x.device)
        outputs.append(run(name, tuple(part(a, index) for a in args), {k: part(v, index) for k, v in kwargs.items()}))
    inverse = torch.empty(batch, dtype=torch.long, device=x.device)
    inverse[torch.tensor(order, device=x.device)] = torch.arange(batch, device=x.device)
    return join(outputs, inverse, axis)


def join(outputs: list[Any], inverse: Tensor, axis: int) -> Any:
    """Concatenate tensors (or tuples of them) along ``axis`` and undo the sorting of rows."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.cat(outputs, dim=axis).index_select(axis, beside(inverse, first))
    if isinstance(first, tuple):
        return tuple(join([output[i] for output in outputs], inverse, axis) for i in range(len(first)))
    return first
