"""The leading singular directions of matrices, exactly or by random projection."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

__all__ = ["leading", "projected"]

_SPARE = 8  # directions beyond those asked for, without which the last of them come out badly


def leading(matrix: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r largest singular triplets: (*, m, r), (*, r) and (*, r, n)."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :r], S[..., :r], Vh[..., :r, :]


def projected(matrix: Tensor, r: int, rounds: int, seed: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return about the r largest singular triplets (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, alg. 4.4, 5.1).

    Args:
        matrix: (*, m, n).
        rounds: how many times the subspace is multiplied with the matrix and its transpose.
        seed: what the projection is drawn from. It does not depend on torch's seed, so that an adapter that is loaded
            finds the directions again that it started from.
    """
    m, n = matrix.shape[-2:]
    size = min(r + _SPARE, m, n)
    digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    probe = torch.randn(*matrix.shape[:-2], n, size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    Q = torch.linalg.qr(matrix @ probe).Q
    for _ in range(rounds):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ Q).Q).Q
    U, S, Vh = leading(Q.mT @ matrix, r)
    return Q @ U, S, Vh
