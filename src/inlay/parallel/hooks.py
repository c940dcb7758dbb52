"""Tensor parallelism hangs on the base layer: it turns the input into a distributed tensor and the output back.

The adapters of the layer need the distributed input too, so on injection all of that moves up to the adapted layer,
and on ejection back down. torch (``parallelize_module``) uses forward hooks; transformers replaces ``forward``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["lift", "lower", "rebind", "transformers_style"]

_HOMES = ("torch.distributed.tensor._api", "torch.distributed.tensor.parallel.style")
# a table of hooks and the marks that go with it
_TABLES = (
    ("_forward_pre_hooks", ("_forward_pre_hooks_with_kwargs",)),
    ("_forward_hooks", ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")),
)
_KEPT = "_base_forward"


def lift(base: nn.Module, adapted: nn.Module) -> None:
    """Move what tensor parallelism put on a base layer up to the adapted layer."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    _move_hooks(base, adapted)
    style, mesh, inner = _installed(base)
    if style is not None:
        adapted.__dict__[_KEPT] = base.__dict__.pop("forward")
        if getattr(inner, "__func__", None) is not type(base).forward:
            base.__dict__["forward"] = inner  # something else was there before
        style.install_forward(adapted, mesh)


def lower(adapted: nn.Module, base: nn.Module) -> None:
    """Move it back down: the base layer is as it was before :func:`lift`."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    _move_hooks(adapted, base)
    kept = adapted.__dict__.pop(_KEPT, None)
    if kept is not None:
        adapted.__dict__.pop("forward", None)
        base.__dict__["forward"] = kept


def rebind(copied: nn.Module) -> None:
    """Make a deep copy of modules run itself: transformers' ``forward`` is a closure over the original module."""
    for module in copied.modules():
        style, mesh, _ = _installed(module)
        if style is not None:
            del module.__dict__["forward"]
            style.install_forward(module, mesh)


def transformers_style(module: nn.Module) -> Any:
    """Return the tensor-parallel style that transformers installed on a module, None where there is none."""
    return _installed(module)[0]


def _installed(module: nn.Module) -> tuple[Any, Any, Callable[..., Any] | None]:
    """Return transformers' style, its mesh and the forward below it."""
    forward = module.__dict__.get("forward")
    library = sys.modules.get("transformers.distributed.tensor_parallel")
    if forward is None or library is None or getattr(forward, "__closure__", None) is None:
        return None, None, None
    held = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__), strict=True))
    style = held.get("self")
    if not isinstance(style, library.TensorParallelLayer):
        return None, None, None
    return style, held["mesh"], held["original_forward"]


def _move_hooks(source: nn.Module, target: nn.Module) -> None:
    for table, marks in _TABLES:
        hooks = getattr(source, table)
        for key in [key for key, hook in hooks.items() if _is_parallel(hook)]:
            getattr(target, table)[key] = hooks.pop(key)
            for mark in marks:
                if getattr(source, mark).pop(key, None):
                    getattr(target, mark)[key] = True


def _is_parallel(hook: Callable[..., Any]) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", None) in _HOMES
