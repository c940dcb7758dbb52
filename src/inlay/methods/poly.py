"""Poly: an inventory of LoRAs, mixed by what each task has learned (2202.13914); with splits MHR (2211.03831)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inlay.config import PeftConfig, PeftType, TargetFields, setting, settings
from inlay.core.affine import LowRank, Site
from inlay.core.divisors import undivided
from inlay.core.fills import Transposed
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Slot, Uniform
from inlay.core.tasks import checked_tasks

__all__ = ["Poly", "PolyConfig"]


@settings(
    positional="r target_modules exclude_modules modules_to_save init_weights poly_type n_tasks n_skills n_splits"
)
class PolyConfig(TargetFields, PeftConfig):
    """Configuration of Poly."""

    peft_type = PeftType.POLY

    r: int = setting(
        default=8, doc="Rank of each skill.", gt=0, parameters="proportional: n_skills * r * (in + out) a linear layer"
    )
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise every skill is random.")
    poly_type: str = setting(default="poly", doc="The router; there is one.", choices=("poly",))
    n_tasks: int = setting(
        default=1, doc="Tasks.", gt=0, parameters="n_tasks * n_splits * n_skills a layer for the router"
    )
    n_skills: int = setting(default=4, doc="LoRAs that are mixed.", gt=0, parameters="proportional")
    n_splits: int = setting(default=1, doc="Parts of the features that are mixed each in its own way.", gt=0)


@register_method
class Poly(Method):
    """``W x + B_t A_t x / r``: A_t and B_t are means of n skills, by weights that the sample's task t has.

    In training the weights are drawn from a relaxed Bernoulli distribution around what is learned.
    """

    config_class = PolyConfig
    prefix = "poly_"
    numbers = ("r", "n_tasks", "n_skills", "n_splits")
    mergeable = False
    samples = True
    reads_tasks = True
    additive = False  # the update depends on the sample
    commutes = True
    config: PolyConfig

    def refuse(self, site: Site) -> str | None:
        return undivided(site, "n_splits", self.config.n_splits)

    def slots(self, site: Site) -> dict[str, Slot]:
        config = self.config
        sizes: dict[str, Any] = {"q": config.n_splits, "s": config.n_skills, "r": config.r}
        sizes |= {"i": site.fan_in // config.n_splits, "o": site.out // config.n_splits}
        sizes |= {"t": config.n_tasks, "w": config.n_splits * config.n_skills}
        # PEFT draws every matrix transposed, and one skill after the other
        down, up = (Transposed(Uniform(1 / math.sqrt(sizes[dim])), leading=True) for dim in "ir")
        return {
            "A": site.slot("poly_lora_A.*", "q s i r", down, **sizes),
            "B": site.slot("poly_lora_B.*", "q s r o", self.still_or(up), **sizes),
            "logits": site.slot("poly_router.*.module_logits", "t w", Uniform(1e-3), **sizes),
        }

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        config = self.config
        tasks = checked_tasks(site, inner.tasks(x), config.n_tasks)
        if tasks is None:
            tasks = torch.zeros(len(x) if p.training else 1, dtype=torch.long, device=p.logits.device)
        logits = p.logits[tasks.to(p.logits.device)].view(-1, config.n_splits, config.n_skills)
        if p.training:
            tiny = torch.finfo(logits.dtype).eps
            noise = torch.rand_like(logits).clamp(tiny, 1 - tiny)
            logits = logits + noise.log() - (-noise).log1p()
        weights = torch.sigmoid(logits)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-12)
        A = torch.einsum("bqs,qsir->bqir", weights, p.A).flatten(1, 2).mT
        B = torch.einsum("bqs,qsro->bqor", weights, p.B).flatten(1, 2)
        if len(weights) == 1:
            return inner.plus(x, p, LowRank(B[0] / config.r, A[0]))
        y = inner(x)
        return (y + inner.up(inner.down(x, A), B / config.r)).to(y.dtype)
