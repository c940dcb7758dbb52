"""What belongs to one forward: which adapter serves which sample, and whether adapters are off.

A :class:`Call` is immutable and lives in a ``threading.local``, so that threads do not see each other's. It must
also be there when a gradient checkpoint recomputes its block inside backward, long after the ``with`` has ended,
maybe in one of autograd's own threads. So a layer that runs under a call leaves it with every checkpoint it finds
on the stack, and a layer that is recomputed inside backward takes it from there. Which adapters were active is left
there as well, so that switching them between forward and backward does no harm.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor

from inlay.core.routes import Routes
from inlay.kernels.switch import fast_paths

if TYPE_CHECKING:
    from inlay.core.state import State

__all__ = ["Call", "call_in_force", "call_of", "checkpoint_around", "may_be_checkpointed", "opened"]

_CHECKPOINT_FILE = torch_checkpoint.__file__
_MARK = "_inlay_calls"


@dataclass(frozen=True, eq=False)
class Call:
    """The choices of one forward of one model.

    Attributes:
        state: the model it belongs to; layers of other models ignore it.
        names: adapter by sample (``__base__`` for none), or None.
        disabled: no adapter at all.
        active: the active adapters, where they are not those that the state has now: a checkpointed block is recomputed
            with the ones that it ran with.
        tasks: (samples,) the task of each sample, for methods that choose by it, or None.
        expand: beams or return sequences per sample; a layer may see that many rows of each, one after the other.
        routes: which rows each adapter serves, for all layers; None where code is traced.
    """

    state: State
    names: tuple[str, ...] | None = None
    disabled: bool = False
    active: tuple[str, ...] | None = None
    expand: int = 1
    routes: Routes | None = None
    tasks: Tensor | None = None

    def names_for(self, x: Any) -> tuple[str, ...]:
        """Return the adapter of each row of a layer's input."""
        assert self.names is not None
        if self.expand > 1:
            rows = len(self.names) * self.expand
            sides = x.shape[:2]
            if rows in sides and len(self.names) not in sides:
                return tuple(name for name in self.names for _ in range(self.expand))
        return self.names


class _Local(threading.local):
    calls: tuple[Call, ...] = ()


_local = _Local()


@contextmanager
def opened(
    state: State,
    *,
    names: Sequence[str] | None = None,
    disabled: bool | None = None,
    expand: int = 1,
    tasks: Tensor | None = None,
) -> Iterator[Call]:
    """Open a call on ``state`` for the running thread; what is not given is inherited from the enclosing one."""
    before = _local.calls
    call = next((outer for outer in reversed(before) if outer.state is state), None) or Call(state)
    if names is not None:
        routes = None if torch.compiler.is_compiling() else Routes(names)
        call = replace(call, names=tuple(names), expand=expand, routes=routes)
    if disabled is not None:
        call = replace(call, disabled=disabled)
    if tasks is not None:
        call = replace(call, tasks=tasks)
    _local.calls = (*before, call)
    fast_paths.detours += 1
    try:
        yield call
    finally:
        _local.calls = before
        fast_paths.detours -= 1


def call_of(state: State) -> Call | None:
    """Return the innermost call that this thread has open on ``state``, outside of any forward too."""
    for call in reversed(_local.calls):  # a plain loop, which older dynamo traces as well
        if call.state is state:
            return call
    return None


def call_in_force(state: State, training: bool) -> Call | None:
    """Return the call that the running forward of ``state``'s model, or a recomputation of it, must honour.

    Args:
        training: whether the layer that asks is in training mode, where a checkpoint may run it.
    """
    if torch.compiler.is_compiling():
        return call_of(state)
    if torch._C._current_graph_task_id() != -1:
        return _recalled(state)
    call = call_of(state)
    if call is not None or may_be_checkpointed(training):
        for holder, recomputing in _walk(sys._getframe(1)):
            if not recomputing:
                _leave(holder, state, call)
    return call


def may_be_checkpointed(training: bool) -> bool:
    """Whether it is worth looking for a checkpoint on the stack; cheap, and never wrongly False."""
    if not torch.is_grad_enabled():  # a reentrant checkpoint runs its block without gradients
        return training
    return training if _top_hooks is None else _top_hooks(True) is not None


def checkpoint_around(training: bool) -> int:
    """Return a number that tells the innermost gradient checkpoint on the stack from others, 0 where there is none."""
    if torch._C._current_graph_task_id() == -1 and not may_be_checkpointed(training):
        return 0
    return next((id(holder) for holder, _ in _walk(sys._getframe(1))), 0)


_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _leave(holder: Any, state: State, call: Call | None) -> None:
    """Leave with a checkpoint what its block runs under: the call, and which adapters the state has on."""
    marks: dict[int, Call] | None = getattr(holder, _MARK, None)
    if marks is None:
        marks = {}
        setattr(holder, _MARK, marks)
    if id(state) not in marks:  # the call holds the state, so its id stays its own
        call = Call(state) if call is None else call
        marks[id(state)] = replace(call, active=state.active, disabled=call.disabled or not state.enabled)


def _recalled(state: State) -> Call | None:
    """Inside backward: the call that the recomputed checkpoint ran under (nested checkpoints inherit it)."""
    inner: list[Any] = []
    for holder, recomputing in _walk(sys._getframe(2)):
        if recomputing:
            marks: dict[int, Call] = getattr(holder, _MARK, {})
            for nested in inner:
                setattr(nested, _MARK, marks)
            return marks.get(id(state))
        inner.append(holder)
    return None


def _walk(frame: FrameType | None) -> Iterator[tuple[Any, bool]]:
    """Yield (object that lives as long as the checkpoint does, whether it is being recomputed), innermost first."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _CHECKPOINT_FILE:
            name = code.co_name
            if name == "forward" and "ctx" in frame.f_locals:  # CheckpointFunction: reentrant
                yield frame.f_locals["ctx"], False
            elif name == "backward" and "ctx" in frame.f_locals:
                yield frame.f_locals["ctx"], True
            elif name == "checkpoint" and frame.f_locals.get("gen") is not None:  # not reentrant
                running = frame.f_locals["gen"].gi_frame
                if running is not None and "new_frame" in running.f_locals:
                    yield running.f_locals["new_frame"], False
            elif name == "unpack_hook" and "frame" in frame.f_locals:
                yield frame.f_locals["frame"], True
        frame = frame.f_back
