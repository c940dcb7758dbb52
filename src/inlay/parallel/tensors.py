"""The one gather and the one scatter: between a tensor in this process and a tensor spread over processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "beside",
    "decide",
    "gather",
    "in_blocks",
    "is_distributed",
    "local_share",
    "replicate",
    "rewrap",
    "scatter",
    "summed",
]


def is_distributed(tensor: object) -> bool:
    """Whether a tensor is spread over processes, as a ``DTensor``; imports nothing."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather(tensor: Tensor) -> Tensor:
    """Return the whole tensor, the same in every process, without gradient; a plain one shares its memory.

    Collective: every process of the tensor's mesh must call it, for the same tensors in the same order.
    """
    if not is_distributed(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.full_tensor()  # type: ignore[attr-defined]


@torch.no_grad()
def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """Return ``whole`` as ``like`` is: in its dtype, on its device, and this process's part where it is spread.

    Needs no communication, unless ``whole`` is itself spread, in another way. The result may share memory with it.

    Args:
        whole: the full tensor, the same in every process, or a distributed one.
        like: the tensor whose placement is wanted.

    Raises:
        ValueError: the shapes differ.
    """
    if whole.shape != like.shape:
        raise ValueError(f"cannot scatter {tuple(whole.shape)} as a tensor of shape {tuple(like.shape)}")
    whole = whole.detach()
    if is_distributed(whole) and not _alike(whole, like):
        whole = gather(whole)
    if is_distributed(whole) or not is_distributed(like):
        return whole.to(device=like.device, dtype=like.dtype)
    local = like.to_local()  # type: ignore[attr-defined]
    share = local_share(whole, like.device_mesh, like.placements)  # type: ignore[attr-defined]
    # a copy, so that a part does not keep the whole alive
    return rewrap(torch.empty_like(share, device=local.device, dtype=local.dtype).copy_(share), like)


def _alike(one: Any, other: Any) -> bool:
    """Whether two distributed tensors are spread in the same way; False where one is plain."""
    return is_distributed(other) and one.device_mesh == other.device_mesh and one.placements == other.placements


def local_share(whole: Tensor, mesh: Any, placements: tuple[Any, ...]) -> Tensor:
    """Return this process's part of a full tensor, as a view."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    for axis, (start, size) in enumerate(zip(offset, shape, strict=True)):
        whole = whole.narrow(axis, min(start, whole.shape[axis]), size)
    return whole


def rewrap(local: Tensor, like: Tensor) -> Tensor:
    """Return a part as a distributed tensor that is spread as ``like`` is."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        like.device_mesh,  # type: ignore[attr-defined]
        like.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def beside(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor that every process has in the form in which it can meet ``other`` in one operator."""
    return replicate(tensor, other.device_mesh) if is_distributed(other) else tensor  # type: ignore[attr-defined]


def decide(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Apply a function to whole tensors, without gradient; the result can meet them in one operator.

    For choices that torch cannot make on distributed tensors (searching, sorting).
    """
    held: Any = next(filter(is_distributed, tensors), None)
    if held is None:
        return function(*tensors)
    with torch.no_grad():
        return replicate(function(*map(gather, tensors)), held.device_mesh)


def in_blocks(x: Tensor, size: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Cut the last axis of ``x`` into blocks, (..., n / size, size), apply a function and put it together again.

    Where processes hold parts of that axis and a block would lie on two of them, every process first gets the whole
    axis, and in backward its whole gradient.
    """
    if not is_distributed(x):
        return function(x.unflatten(-1, (-1, size))).flatten(-2)
    from torch.distributed.tensor import Replicate

    mesh, last = x.device_mesh, x.dim() - 1  # type: ignore[attr-defined]
    uneven = [x.shape[-1] // size % mesh.size(i) != 0 for i in range(mesh.ndim)]
    placements = [
        Replicate() if placement.is_shard(last) and uneven[i] else placement
        for i, placement in enumerate(x.placements)  # type: ignore[attr-defined]
    ]
    x = x.redistribute(placements=placements)  # type: ignore[attr-defined]
    y: Any = function(x.unflatten(-1, (-1, size))).flatten(-2)
    # Changes nothing, but makes its gradient come in the same placement.
    return y.redistribute(placements=y.placements)


def summed(tensor: Tensor) -> Tensor:
    """Return a tensor of which processes hold parts of a sum with the sum in all of them; others as they are."""
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]  # type: ignore[attr-defined]
    return tensor.redistribute(placements=placements)  # type: ignore[attr-defined]


def replicate(tensor: Tensor, mesh: Any) -> Tensor:
    """Return a tensor that every process has as a distributed one; gradients reach the plain tensor, summed."""
    if is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
