"""Writing logits down as the weights of the largest ones, and back."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest_alone", "with_the_others"]

# What the keys of such logits end with, in PEFT's files.
_INDICES, _WEIGHTS = "_topk_indices", "_topk_weights"


def largest_alone(tensors: dict[str, Tensor], of: str, count: int, size: int) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the numbers and the weights of each ``count`` largest logits alone.

    Args:
        of: what the keys of logits contain.
        size: how many logits a softmax has.
    """
    limits = {torch.uint8: 2**8, torch.int16: 2**15, torch.int32: 2**31}
    dtype = next((dtype for dtype, limit in limits.items() if size < limit), torch.int64)
    result = {}
    for key, value in tensors.items():
        if of not in key:
            result[key] = value
            continue
        largest, index = value.topk(count, dim=-1)
        result[f"{key}{_INDICES}"] = index.to(dtype)
        result[f"{key}{_WEIGHTS}"] = largest.softmax(-1)[..., :-1].contiguous()  # the last is what is missing to 1
    return result


def with_the_others(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Undo :func:`largest_alone`; the other logits are minus infinity."""
    result = dict(tensors)
    for key in tensors:
        stem = key.removesuffix(_INDICES)
        if stem == key or f"{stem}{_WEIGHTS}" not in tensors:
            continue
        index, weights = result.pop(key).long(), result.pop(f"{stem}{_WEIGHTS}")
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        logits = weights.new_full((*weights.shape[:-1], size), -torch.inf)
        result[stem] = logits.scatter(-1, index, weights.log())
    return result
