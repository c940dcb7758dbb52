"""Methods that leave rows of their update out of a training forward (``rank_dropout``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inlay.core.affine import Dense, Site
from inlay.core.method import Inner, Method, P

__all__ = ["RowDropout"]


class RowDropout(Method):
    """``alpha / r`` times an update of few factors, which has no dropout but that of whole rows or of all of it.

    A subclass gives ``slots`` and ``delta``; its config has :class:`inlay.config.LycorisFields`.
    """

    mixed = True
    numbers = ("r", "alpha")

    def options(self, site: Site) -> dict[str, Any]:
        found = super().options(site)
        return {**found, "scaling": found["alpha"] / found["r"]}

    def kernel_dims(self, site: Site) -> str | None:
        """Return the dims of a kernel's own tensor in Tucker form, None where the kernel is flattened."""
        if not self.config.use_effective_conv2d or math.prod(site.kernel) == 1:
            return None
        return "r r *kernel 1" if len(site.kernel) == 1 else "r r *kernel"  # PEFT stores conv1d as flat conv2d

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        if not (p.training and self.config.rank_dropout > 0.0):
            return super().forward(site, p, x, inner)
        y = inner(x)
        weight = self.update(site, p).dense()
        kept = (torch.rand_like(weight[..., :1]) > self.config.rank_dropout).to(weight.dtype)
        if getattr(self.config, "rank_dropout_scale", True):  # the update keeps its size on average
            kept = kept / kept.mean().clamp_min(1 / kept.numel())  # no row kept: no update, and no division by zero
        return (y + inner.apply(x, Dense(weight * kept))).to(y.dtype)
