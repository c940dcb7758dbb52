"""Orthogonal start: both factors random, and their product zero (datta0, "Rethinking LoRA initialisation", 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.core.dtype import merge_dtype
from inlay.core.slot import Init
from inlay.inits.start import Start

__all__ = ["Orthogonal"]


class Orthogonal(Start):
    """``A = Q_1' X`` and ``B = Y Q_2`` with X, Y random and Q_1, Q_2 alternate rows of a random rotation: B A = 0.

    Both factors get gradients from the first step on, and the base stays as it is.
    """

    def refuse(self, site: Site, r: int, scaling: float) -> str | None:
        if r % 2:
            return f"init_lora_weights='orthogonal' needs an even rank, because A and B share it by halves; found r={r}"
        return None

    def fills(self, site: Site, r: int) -> tuple[Init, Init]:
        n = math.prod(site.experts)
        halves = _Halves(r // site.groups)
        return _Down(halves), _Up(halves, n)


class _Halves:
    """Alternate rows of one rotation: A is filled first and turns it, and B takes the other half."""

    def __init__(self, r: int) -> None:
        self.r = r
        self.second: Tensor | None = None

    def turned(self, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
        """Draw a rotation; returns its first half, (r / 2, r)."""
        Q = torch.linalg.qr(torch.randn(self.r, self.r, generator=generator, dtype=dtype)).Q
        self.second = Q[1::2]
        return Q[0::2]


class _Down:
    """Fills A: (blocks * r, *columns)."""

    def __init__(self, halves: _Halves) -> None:
        self.halves = halves

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        dtype = merge_dtype(tensor.dtype)
        first = self.halves.turned(generator, dtype)
        blocks = tensor.flatten(1).view(-1, self.halves.r, tensor[0].numel())
        for block in blocks:
            block.copy_(first.T @ (torch.randn(block.shape[1], len(first), generator=generator, dtype=dtype) / 10).T)


class _Up:
    """Fills B: (out, r * experts, *ones), the experts fastest."""

    def __init__(self, halves: _Halves, experts: int) -> None:
        self.halves = halves
        self.experts = experts

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        second = self.halves.second
        if second is None:
            raise RuntimeError("the up-projection was filled before the down-projection, whose other half it takes")
        columns = tensor.view(len(tensor), self.halves.r, self.experts)
        for expert in range(self.experts):
            drawn = torch.randn(len(second), len(tensor), generator=generator, dtype=second.dtype) / 10
            columns[..., expert].copy_(drawn.T @ second)
