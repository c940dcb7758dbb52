"""KaSA: an update with singular values, in place of the weight's smallest ones (Wang et al. 2024, arXiv:2412.06071)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from inlay.core.affine import Affine, Site
from inlay.core.dtype import merge_dtype
from inlay.core.lifecycle import total
from inlay.core.method import P
from inlay.core.slot import Constant, Normal, Slot
from inlay.inits.start import blocks_of
from inlay.methods.lora import LoRA

__all__ = ["KaSA"]


class KaSA(LoRA):
    """``W_(k-r) + scaling * B diag(d) A``, where W_(k-r) is the weight without its r smallest singular directions."""

    adds_penalty = False
    identity = False
    rebases = True

    @property
    def base_cause(self) -> str:
        return super().base_cause if self.start.changes_base else "kasa_config"

    def refuse(self, site: Site) -> str | None:
        r, ends = self.options(site)["r"] // site.groups, (site.out // site.groups, site.fan_in)
        if r >= min(ends):
            return (
                f"kasa_config takes {r} singular directions out of a weight of {ends[0]} x {ends[1]}, which leaves none"
            )
        return super().refuse(site)

    def slots(self, site: Site) -> dict[str, Slot]:
        slots = super().slots(site)
        # a start that has chosen B A must find it unscaled
        start = Normal(1.0) if self.start.name in (True, False, "gaussian") else Constant(1.0)
        diagonal = site.slot("lora_diag.*", "*experts r", start, r=self.options(site)["r"])
        return {**slots, "diag": replace(diagonal, blocks=slots["A"].blocks // math.prod(site.experts))}

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine:
        weight = blocks_of(site, layer.weight)
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        kept = S.shape[-1] - self.options(site)["r"] // site.groups
        shortened = (U[..., :kept] * S[..., None, :kept]) @ Vh[..., :kept, :]
        shortened_layer = Affine(shortened.reshape(layer.weight.shape), layer.bias)
        return super().prepare(site, p, shortened_layer) or shortened_layer

    def made_of(self, p: P) -> tuple[Tensor, ...]:
        return *super().made_of(p), p.diag

    def pair(self, site: Site, p: P) -> tuple[Tensor, Tensor]:
        A, B = super().pair(site, p)
        if site.groups > 1:  # their B has columns for one group only
            return A * p.diag.unsqueeze(-1), B
        return A, B * p.diag.unsqueeze(-2)

    def kasa_terms(self, layers: Sequence[tuple[Site, P]]) -> list[Tensor]:
        """Return what is added to the loss for each layer."""
        options = self.config.kasa_config
        assert options is not None
        terms = []
        for site, p in layers:
            A, B = (factor.to(merge_dtype(factor.dtype)) for factor in super().pair(site, p))
            A, B = A.unflatten(-2, (site.groups, -1)), B.unflatten(-2, (site.groups, -1))
            eye = torch.eye(A.shape[-2], dtype=A.dtype, device=A.device)
            far = [torch.linalg.vector_norm(gram - eye, dim=(-3, -2, -1)).sum() for gram in (A @ A.mT, B.mT @ B)]
            terms.append(options.beta * p.diag.to(A.dtype).square().sum() + options.gamma * (far[0] + far[1]))
        return terms

    def penalty(self, layers: Sequence[tuple[Site, P]]) -> Tensor | None:
        others = super().penalty(layers)
        return total([*self.kasa_terms(layers), *([] if others is None else [others])])
