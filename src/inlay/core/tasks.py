"""Which task each sample belongs to, for methods that choose by task; and sub-batches that must not see each other."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.core.call import Call, call_in_force
from inlay.errors import RoutingError

if TYPE_CHECKING:
    from inlay.core.layer import AdaptedLayer

__all__ = ["checked_tasks", "run_apart", "tasks_of"]

_TASKS = "inlay_task_ids"


class _Local(threading.local):
    rows: Tensor | None = None  # tasks of the sub-batch that runs


_local = _Local()


def tasks_of(layer: AdaptedLayer, x: Tensor) -> Tensor | None:
    """Return the task of each row of a layer's input, None where none was chosen.

    Raises:
        RoutingError: there are not as many rows as tasks.
    """
    if _local.rows is not None:
        return _local.rows
    call = call_in_force(layer.state, layer.training)
    return None if call is None else _for_rows(layer, call, x)


def checked_tasks(site: Site, tasks: Tensor | None, count: int) -> Tensor | None:
    """Return the tasks of an adapter that has ``count`` of them, None where none was chosen and there is only one.

    Raises:
        RoutingError: none was chosen out of several, or one that is none of them.
    """
    if tasks is None:
        if count > 1:
            raise RoutingError(
                f"{site.name!r}: the adapter has {count} tasks, and none was chosen; pass task_ids with one for each "
                "sample"
            )
    elif not torch.compiler.is_compiling() and not 0 <= int(tasks.min()) <= int(tasks.max()) < count:
        raise RoutingError(f"task_ids: expected numbers below n_tasks={count}, found {tasks.tolist()}")
    return tasks


def _for_rows(layer: AdaptedLayer, call: Call, x: Tensor) -> Tensor | None:
    tasks = call.tasks
    if tasks is None or len(tasks) == x.shape[0]:
        return tasks
    if x.shape[0] % len(tasks):
        raise RoutingError(
            f"{layer.site.name!r}: task_ids has {len(tasks)} samples, and the layer received {x.shape[0]} rows (shape "
            f"{tuple(x.shape)})"
        )
    return tasks.repeat_interleave(x.shape[0] // len(tasks))  # beams, one after the other


def run_apart(
    layer: AdaptedLayer, call: Call, here: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run each adapter on its samples, and on each of them alone where the method couples samples of a batch."""
    x = args[0] if args else next(iter(kwargs.values()))
    if layer.site.pooled:
        x = layer.kind.called(layer.leaf_layer, x, args[1:], kwargs).samples
    tasks = _for_rows(layer, call, x)
    alone = {name for name in here if any(entry.method.couples for entry in layer.entries[name])}
    names = tuple(f"{name}\0{row}" if name in alone else name for row, name in enumerate(call.names_for(x)))

    def run(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, _local.rows = _local.rows, kwargs.pop(_TASKS, None)
        try:
            return layer._run_named(name.partition("\0")[0], args, kwargs)
        finally:
            _local.rows = before

    return layer.kind.routed(layer, names, run, args, kwargs if tasks is None else {**kwargs, _TASKS: tasks})
