"""Tensor parallelism hangs on the base layer: it turns the input into a distributed tensor and the output back.

The adapters of the layer need the distributed input too, so on injection all of that moves up to the adapted layer,
and on ejection back down. torch (``parallelize_module``) uses forward hooks; transformers replaces ``forward``.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from inlay.errors import UnsupportedError
from inlay.parallel.tensors import is_distributed

__all__ = ["copied", "hidden_reduction", "lift", "lower"]

_HOMES = ("torch.distributed.tensor._api", "torch.distributed.tensor.parallel.style")
# a table of hooks and the marks that go with it
_TABLES = (
    ("_forward_pre_hooks", ("_forward_pre_hooks_with_kwargs",)),
    ("_forward_hooks", ("_forward_hooks_with_kwargs", "_forward_hooks_always_called")),
)
_KEPT = "_base_forward"
_TRANSFORMERS = "transformers.distributed.tensor_parallel"
_TRANSFORMERS_BEFORE_5_17 = "transformers.integrations.tensor_parallel"


def lift(base: nn.Module, adapted: nn.Module) -> None:
    """Move what tensor parallelism put on a base layer up to the adapted layer."""
    if "torch.distributed.tensor" not in sys.modules:
        return
    if not (base._forward_pre_hooks or base._forward_hooks or "forward" in base.__dict__):
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


def copied(module: nn.Module) -> nn.Module:
    """Return a deep copy of a module that runs itself: transformers' ``forward`` is a closure over the original.

    Raises:
        UnsupportedError: the closure cannot be made again.
    """
    for name, part in module.named_modules():
        reason = hidden_reduction(part)
        if reason is not None:
            raise UnsupportedError(f"{name or type(module).__name__!r} cannot be copied: {reason}")
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if is_distributed(tensor):  # torch cannot copy one whose part does not begin where its memory does
            twin = tensor.detach().clone()
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = twin
    copy_ = copy.deepcopy(module, memo)
    for part in copy_.modules():
        style, mesh, _ = _installed(part)
        if style is not None:
            del part.__dict__["forward"]
            style.install_forward(part, mesh)
    return copy_


def hidden_reduction(module: nn.Module) -> str | None:
    """Say why nothing can be added to a module that transformers computes on plain parts of tensors, None otherwise.

    Its sums over processes are then made by hand, for the base's own tensors only.
    """
    if not (module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__):
        return None
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if any(_home(hook) == _TRANSFORMERS_BEFORE_5_17 for hook in hooks):
        return (
            "transformers before 5.17 holds plain parts of a layer under tensor parallelism, which nothing can follow"
        )
    forward = module.__dict__.get("forward")
    if getattr(forward, "__module__", None) != _TRANSFORMERS:
        return None
    style = _installed(module)[0]
    if style is not None and all(is_distributed(p) for p in module.parameters(recurse=False)):
        return None
    name = str(getattr(forward, "__qualname__", "")).partition(".")[0] if style is None else type(style).__name__
    return (
        f"it runs under transformers' {name}, which sums over processes by hand, for its own tensors only, so an "
        "adapter's gradient would be one process's share"
    )


def _installed(module: nn.Module) -> tuple[Any, Any, Callable[..., Any] | None]:
    """Return transformers' tensor-parallel style, its mesh and the forward below it; Nones where there is no style."""
    forward = module.__dict__.get("forward")
    library = sys.modules.get(_TRANSFORMERS)
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
        for key in [key for key, hook in hooks.items() if _home(hook) in _HOMES]:
            getattr(target, table)[key] = hooks.pop(key)
            for mark in marks:
                if getattr(source, mark).pop(key, None):
                    getattr(target, mark)[key] = True


def _home(hook: Callable[..., Any]) -> str | None:
    """Return the name of the module that a hook was written in."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", None)
