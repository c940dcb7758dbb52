"""Counting bytes: what a forward pass keeps for the backward pass, and the peak of what an action allocates."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


def kept_for_backward(forward: Callable[[], Any], besides: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the tensors that autograd saves during ``forward``, each storage once.

    Args:
        forward: runs under ``saved_tensors_hooks``; what it returns is held until the count is done.
        besides: tensors whose storages do not count: parameters and buffers.
    """
    excluded = {tensor.untyped_storage().data_ptr() for tensor in besides}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in saved.values())
    del result
    return total


def allocated_bytes(action: Callable[[], Any]) -> tuple[int, int]:
    """``(peak, left)``: bytes that torch's CPU allocator gave out above the start, at most and at the action's end.

    It sees every tensor, also those inside an operator and those that a hand-written autograd function keeps without
    saving them; not what numpy or a memory-mapped file holds. The result of ``action`` counts as left.
    """
    from torch.autograd.profiler import profile
    from torch.autograd.profiler_util import MEMORY_EVENT_NAME

    gc.collect()
    recorded = profile(profile_memory=True, use_cpu=True)
    with _silenced():
        recorded.__enter__()
    try:
        result = action()
    finally:
        with _silenced():
            recorded.__exit__(None, None, None)
    del result
    results = recorded.kineto_results
    assert results is not None
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == MEMORY_EVENT_NAME]
    now = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        now += change
        peak = max(peak, now)
    return peak, now


@contextmanager
def _silenced() -> Iterator[None]:
    """Without what the profiler's C++ side writes on stderr at each start and stop."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@cache
def _elsewhere() -> torch.Tensor:
    return torch.zeros(2**24)


def empty_caches() -> None:
    """Write 64 MiB, so that nothing of what is measured next lies in the processor's caches."""
    _elsewhere().add_(1.0)
