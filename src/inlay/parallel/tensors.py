"""The one gather and the one scatter: between a tensor in this process and a tensor spread over processes."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["gather", "is_distributed", "local_share", "replicate", "scatter"]


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
    with torch.no_grad():
        return tensor.full_tensor() if is_distributed(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """Return ``whole`` as ``like`` is: in its dtype, on its device, and this process's part where it is spread.

    Needs no communication. The result may share memory with ``whole``.

    Args:
        whole: the full tensor, the same in every process; a distributed one keeps its placement.
        like: the tensor whose placement is wanted.

    Raises:
        ValueError: the shapes differ.
    """
    if whole.shape != like.shape:
        raise ValueError(f"cannot scatter {tuple(whole.shape)} as a tensor of shape {tuple(like.shape)}")
    whole = whole.detach()
    if not is_distributed(like) or is_distributed(whole):
        return whole.to(device=like.device, dtype=like.dtype)
    local = like.to_local()  # type: ignore[attr-defined]
    share = local_share(whole, like.device_mesh, like.placements)  # type: ignore[attr-defined]
    # a copy, so that a part does not keep the whole alive
    return rewrap(torch.empty_like(share, device=local.device, dtype=local.dtype).copy_(share), like)


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


def replicate(tensor: Tensor, mesh: Any) -> Tensor:
    """Return a tensor that every process has as a distributed one; gradients reach the plain tensor, summed."""
    if is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
