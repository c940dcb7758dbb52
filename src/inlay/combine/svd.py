"""Low-rank factors of a matrix by singular value decomposition, and of a sum of low-rank matrices without forming it.

Everything is computed in float32 or wider, because half-precision factors would lose what truncation keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from inlay.core.dtype import merge_dtype

__all__ = ["Factors", "clamped", "energy_rank", "factorise", "factorise_product", "numerical_rank", "resized"]

Factors = tuple[Tensor, Tensor]
"""``(B, A)`` of shapes (..., rows, r) and (..., r, columns), whose product is the matrix."""


def factorise(matrix: Tensor, rank: int, driver: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U``, ``S`` and ``Vh``, cut off at a rank: the nearest matrix of that rank (Eckart and Young 1936).

    Args:
        matrix: (..., rows, columns).
        rank: at most this many singular values are returned.
        driver: cuSOLVER's method, on CUDA only.
    """
    wide = matrix.to(merge_dtype(matrix.dtype))
    U, S, Vh = torch.linalg.svd(wide, full_matrices=False, driver=driver)
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def factorise_product(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return what :func:`factorise` returns for ``B @ A``, whose product is never formed.

    The singular values of ``B @ A`` are those of the small matrix between two orthonormal bases. For a layer of 4096
    by 4096 and factors of rank 32 that is a thousandth of the work.

    Args:
        B: (..., rows, n) with ``n`` at most ``rows``.
        A: (..., n, columns) with ``n`` at most ``columns``.
        rank: as for :func:`factorise`.
    """
    dtype = merge_dtype(B.dtype)
    left, upper = torch.linalg.qr(B.to(dtype))
    right, lower = torch.linalg.qr(A.to(dtype).mT)
    U, S, Vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return left @ U[..., :rank], S[..., :rank], (Vh[..., :rank, :] @ right.mT)


def energy_rank(S: Tensor, share: float) -> int:
    """Return the smallest rank whose singular values hold a share of the sum of squares; at least 1.

    Args:
        S: (..., n), in descending order; leading axes are one after the other and get the same rank.
        share: in (0, 1].
    """
    energy = S.square().cumsum(dim=-1)
    reached = energy >= share * energy[..., -1:]
    return int(reached.int().argmax(dim=-1).max()) + 1


def numerical_rank(S: Tensor, shape: Sequence[int]) -> int:
    """Return how many singular values are more than rounding; at least 1.

    Args:
        S: (..., n), in descending order.
        shape: of the matrix, (..., rows, columns).
    """
    bound = S[..., :1] * max(shape[-2:]) * torch.finfo(S.dtype).eps
    return max(1, int((bound < S).sum(dim=-1).max()))


def clamped(factors: Factors, quantile: float | None) -> Factors:
    """Bound both factors by a quantile of all their entries (positive and negative), on both sides of zero."""
    if quantile is None:
        return factors
    entries = torch.cat([factor.flatten() for factor in factors])
    # torch.quantile takes 16 million entries at most; the two order statistics around the quantile are all it needs
    position = quantile * (entries.numel() - 1)
    below = int(position)
    low, high = (entries.kthvalue(min(index, entries.numel() - 1) + 1).values for index in (below, below + 1))
    bound = torch.lerp(low, high, position - below)
    B, A = (torch.minimum(torch.maximum(factor, -bound), bound) for factor in factors)
    return B, A


def resized(factors: Factors, rank: int) -> Factors:
    """Give factors another inner size: zeros are added, or the zeros that end them are dropped."""
    B, A = factors
    more = rank - B.shape[-1]
    if more < 0:
        return B[..., :rank], A[..., :rank, :]
    return pad(B, (0, more)), pad(A, (0, 0, 0, more))
