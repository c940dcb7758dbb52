"""MiCA: train in the minor singular directions of the weight alone (arXiv:2604.01694)."""

from __future__ import annotations

import torch

from inlay.inits.start import Factors, Given, Leading

__all__ = ["MiCA"]


class MiCA(Leading):
    """B holds the left singular vectors of the r smallest singular values and never trains; A starts at zero."""

    changes_base = False
    trains_up = False

    def factors(self, given: Given) -> Factors:
        U = torch.linalg.svd(given.weight, full_matrices=False).U
        B = U[..., U.shape[-1] - given.r :]
        return Factors(B.new_zeros(*B.shape[:-2], given.r, given.weight.shape[-1]), B)
