"""OLoRA: start from the QR decomposition of the weight (Buyukakyuz 2024, arXiv:2406.01775)."""

from __future__ import annotations

import torch

from inlay.inits.start import Factors, Given, Leading

__all__ = ["OLoRA"]


class OLoRA(Leading):
    """B holds the first r columns of Q, A the first r rows of R, and ``scaling * B A`` is taken out of the base."""

    def factors(self, given: Given) -> Factors:
        Q, R = torch.linalg.qr(given.weight)
        return Factors(R[..., : given.r, :], Q[..., : given.r])
