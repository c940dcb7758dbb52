"""Row norms of a weight with an update, without making the sum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.core.affine import Delta, LowRank
from inlay.core.remember import row_norms

__all__ = ["norms_with"]

# Below this share of the weight's own squared norm too few digits are left, and the row is summed up itself.
_CANCELLED = 1e-3


@torch.no_grad()
def norms_with(weight: Tensor, delta: Delta) -> Tensor:
    """Return the norm of every row of ``weight + delta``, without gradient.

    For a low-rank update s B A it is the root of ``|W|^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>``, by row: one read of W,
    and nothing of its size is made. |W|^2 is kept from one call to the next.

    Args:
        weight: (*experts, out, in).
        delta: an update of the same shape.

    Returns:
        (*experts, out), float32, or float64 for such a weight.
    """
    if not isinstance(delta, LowRank) or not _short(weight, delta):
        return _direct(weight.detach() + delta.dense().detach())
    norms = row_norms(weight)
    scale = float(delta.scale)
    A, B = delta.A.detach(), delta.B.detach().to(norms.dtype)
    # The wide product runs in the dtype of the weight, so that no copy of that is made. What it loses is small, because
    # the whole term is small beside |W|^2 wherever this way is taken.
    across = (weight.detach() @ A.to(weight.dtype).mT).to(norms.dtype)
    A = A.to(norms.dtype)
    total = norms + scale * ((2.0 * across + scale * (B @ (A @ A.mT))) * B).sum(-1)
    lost = total < _CANCELLED * norms
    if bool(lost.any()):
        rows = weight.detach()[lost].to(norms.dtype)
        update = B[lost].unsqueeze(-2) @ (A[lost.nonzero(as_tuple=True)[:-1]] if A.dim() > 2 else A)
        total[lost] = (rows + scale * update.squeeze(-2)).square().sum(-1)
    return total.clamp_min_(0.0).sqrt_()


def _short(weight: Tensor, delta: LowRank) -> bool:
    """Whether this is cheaper than the sum, and possible: plain tensors outside of a traced graph."""
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in (weight, delta.A, delta.B))
    number = isinstance(delta.scale, (int, float))
    if not plain or not number or delta.groups != 1 or torch.compiler.is_compiling():
        return False
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return False  # a graph of launches cannot ask whether digits were lost
    return not weight.is_meta and not torch._C._are_functorch_transforms_active()  # these know no values to look at


def _direct(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=-1)
