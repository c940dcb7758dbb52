"""Writing tensors to a safetensors file, byte for byte as its own library does, from where they lie.

No tensor is copied that lies in this machine's memory in one piece, and of the others one at a time, however their
storages overlap.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["storable", "store"]

# In the order of the format, by which tensors are sorted: the last stand first in a file.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: number for number, dtype in enumerate(_NAMES)}
_BUFFER = 2**20  # bytes; larger tensors go to the file as they are


def storable(tensors: Mapping[str, Tensor]) -> bool:
    """Whether :func:`store` can write these tensors; the others are subclasses, sparse, or of rare dtypes."""
    return sys.byteorder == "little" and all(map(_is_usual, tensors.values()))


def store(tensors: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write named tensors that are :func:`storable` to a new file, each in full."""
    order = sorted(tensors.items(), key=lambda item: (-_ORDER[item[1].dtype], item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in order:
        end = at + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=_BUFFER) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, tensor in order:
            here = tensor.detach().to("cpu").contiguous()
            file.write((ctypes.c_char * here.nbytes).from_address(here.data_ptr()))


def _is_usual(tensor: Tensor) -> bool:
    """Whether a tensor's memory is its values, in a dtype of the format."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.dtype in _NAMES and not tensor.is_meta and not tensor.is_neg()
