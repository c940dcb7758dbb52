"""Kullback-Leibler divergences in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dirichlet_divergence"]


def dirichlet_divergence(alpha: Tensor, prior: float) -> Tensor:
    """Return KL(Dirichlet(alpha) || Dirichlet(prior, ..., prior)), alpha (n,)."""
    total, others = alpha.sum(), torch.full_like(alpha, prior)
    volume = torch.lgamma(total) - torch.lgamma(alpha).sum()
    of_prior = torch.lgamma(others.sum()) - torch.lgamma(others).sum()
    return volume - of_prior + ((alpha - others) * (torch.digamma(alpha) - torch.digamma(total))).sum()
