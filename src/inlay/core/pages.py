"""Copies of large tensors, in large pages of memory where the system has them.

Memory that is new to a process comes page by page as it is first written. In pages of 4 KiB that takes longer than to
copy into them; pages of 2 MiB come for a quarter of it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor, nn

__all__ = ["copied"]

_LEAST = 8 * 2**20  # bytes; below, memory may be some that the process has had already


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor on the CPU, with its strides and without gradient."""
    tensor = tensor.detach()
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_meta
    if not plain or tensor.is_quantized or tensor.numel() * tensor.element_size() < _LEAST:
        return tensor.to("cpu", copy=True)
    copy = torch.empty_like(tensor, device="cpu")
    _ask_for_large_pages(copy)
    return copy.copy_(tensor)


def _ask_for_large_pages(tensor: Tensor) -> None:
    """Tell Linux that large pages are welcome for the memory of a tensor; it may not have any."""
    if sys.platform != "linux":
        return
    start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    skipped = -start % mmap.PAGESIZE
    whole = (size - skipped) // mmap.PAGESIZE * mmap.PAGESIZE
    ctypes.CDLL(None).madvise(
        ctypes.c_void_p(start + skipped), ctypes.c_size_t(whole), ctypes.c_int(mmap.MADV_HUGEPAGE)
    )  # that it refuses is no error: the memory is there
