"""The tensors of a safetensors file, mapped into memory: nothing is read before it is used, and nothing twice.

One view of the map for each tensor costs a few microseconds, which is less than the file's own library takes. Whatever
is unusual about a file is left to that library, and so is saying what is wrong with one.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["MappedTensors", "mapped_tensors", "release_of"]

_LARGEST_HEADER = 100_000_000  # bytes, as the format says
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MappedTensors(dict[str, Tensor]):
    """Tensors by name whose values are pages of a file. Writing to one changes neither the file nor another map."""

    def __init__(self, pages: mmap.mmap) -> None:
        super().__init__()
        self._pages = pages

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.values())

    def release(self) -> None:
        """Give back the memory of the pages that were read so far; reading them again takes them from the file.

        So a load needs the memory of its own tensors and not that of the file besides. What was written to a tensor of
        this map is lost.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)


def release_of(tensors: object) -> Callable[[], object] | None:
    """Return what lets go of the pages that tensors were read into, where they are those of a file."""
    return tensors.release if isinstance(tensors, MappedTensors) else None


def mapped_tensors(path: str | os.PathLike[str]) -> MappedTensors | None:
    """Return a file's tensors, or None where it is better read by ``safetensors``: damaged, or with unusual dtypes.

    Raises:
        OSError: the file cannot be opened.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            return None
        entries = _entries(file.read(length), size - 8 - length)
        if entries is None:
            return None
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    found = MappedTensors(pages)
    start = 8 + length
    for name, dtype, shape, offset, count in entries:
        if (start + offset) % dtype.itemsize:
            return None
        if count:
            flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=start + offset)
            found[name] = flat.resize_(*shape) if shape else flat.view(())  # a view takes twice as long
        else:
            found[name] = torch.empty(shape, dtype=dtype)
    return found


def _entries(header: bytes, room: int) -> list[tuple[str, torch.dtype, list[int], int, int]] | None:
    """Return (name, dtype, shape, offset, number of elements) of each tensor, in the order of the file.

    None where the header is not plainly right: every byte of the file must belong to exactly one tensor.
    """
    try:
        content: Any = json.loads(header)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return None
    content.pop("__metadata__", None)
    entries = []
    try:
        for name, entry in content.items():
            start, end = entry["data_offsets"]
            shape, dtype = entry["shape"], _DTYPES[entry["dtype"]]
            count = math.prod(shape)
            if count * dtype.itemsize != end - start or type(start) is not int or start < 0:
                return None
            for extent in shape:
                if type(extent) is not int or extent < 0:
                    return None
            entries.append((start, end, name, dtype, shape, count))
        entries.sort(key=lambda entry: entry[:2])
        last = 0
        for start, end, *_ in entries:
            if start != last:
                return None
            last = end
    except (KeyError, TypeError, ValueError):
        return None
    if last != room:
        return None
    return [(name, dtype, shape, start, count) for start, _, name, dtype, shape, count in entries]
