"""Adapters outside of the model: where their files are, or one flat tensor in this machine's memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.checkpoint.files import load_adapter_files

__all__ = ["Arena", "Folder", "packed"]

_ALIGNMENT = 64  # bytes between the starts of tensors in an arena: a cache line, and more than any dtype needs


@dataclass(frozen=True, slots=True)
class Folder:
    """An adapter in a folder or a Hub repository.

    Attributes:
        path: of the folder, or name of the repository.
        subfolder: a folder inside it.
        hub: keywords of ``huggingface_hub.hf_hub_download``.
    """

    path: str
    subfolder: str | None = None
    hub: Mapping[str, Any] | None = None

    def read(self) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the configuration and the tensors, mapped into memory.

        Raises:
            what :func:`inlay.checkpoint.load_adapter_files` raises.
        """
        return load_adapter_files(self.path, self.subfolder, **(self.hub or {}))

    def __str__(self) -> str:
        return repr(os.path.join(self.path, self.subfolder or ""))


@dataclass(frozen=True, slots=True, eq=False)
class Arena:
    """An adapter in memory: all its tensors in one.

    Attributes:
        config: its configuration.
        flat: the bytes.
        layout: (key, dtype, shape, first byte) of each tensor.
    """

    config: Any
    flat: Tensor
    layout: tuple[tuple[str, torch.dtype, tuple[int, ...], int], ...]

    def read(self) -> tuple[Any, Mapping[str, Tensor]]:
        """Return the configuration and the tensors, which are views."""
        return self.config, {key: _view(self.flat, dtype, shape, start) for key, dtype, shape, start in self.layout}

    def __str__(self) -> str:
        return "memory"


def packed(config: Any, tensors: Mapping[str, Tensor], pinned: bool = False) -> Arena:
    """Copy an adapter's tensors into one flat tensor.

    Args:
        pinned: use page-locked memory, from which an accelerator copies without waiting.
    """
    layout, end = [], 0
    for key, tensor in tensors.items():
        layout.append((key, tensor.dtype, tuple(tensor.shape), end))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    flat = torch.empty(end, dtype=torch.uint8, pin_memory=pinned)
    arena = Arena(config, flat, tuple(layout))
    views = [_view(flat, dtype, shape, start) for _, dtype, shape, start in layout]
    with torch.no_grad():
        if views:
            torch._foreach_copy_(views, [tensor.detach() for tensor in tensors.values()])
    return arena


def _view(flat: Tensor, dtype: torch.dtype, shape: tuple[int, ...], start: int) -> Tensor:
    size = dtype.itemsize
    for n in shape:
        size *= n
    return flat[start : start + size].view(dtype).view(shape)
