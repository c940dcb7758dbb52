"""Poly: an inventory of LoRAs, mixed by what each task has learned (2202.13914); with splits MHR (2211.03831)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.config import PeftConfig, PeftType, TargetFields, setting, settings
from inlay.core.affine import LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Slot, Uniform, zeros
from inlay.errors import RoutingError

if TYPE_CHECKING:
    from inlay.core.inner import Inner

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


def _skills(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill (splits, skills, a, b) as PEFT does: every matrix transposed, uniform in 1 / sqrt(a)."""
    splits, skills, a, b = tensor.shape
    bound = 1 / math.sqrt(a)
    for skill in range(skills):
        for split in range(splits):
            drawn = torch.empty(b, a, dtype=tensor.dtype).uniform_(-bound, bound, generator=generator)
            tensor[split, skill].copy_(drawn.mT)


@register_method
class Poly(Method):
    """``W x + B_t A_t x / r``: A_t and B_t are means of n skills, by weights that the sample's task t has.

    In training the weights are drawn from a relaxed Bernoulli distribution around what is learned.
    """

    config_class = PolyConfig
    prefix = "poly_"
    mergeable = False
    samples = True
    reads_tasks = True
    additive = False  # the update depends on the sample
    commutes = True
    config: PolyConfig

    def options(self, site: Site) -> dict[str, Any]:
        return {name: getattr(self.config, name) for name in ("r", "n_tasks", "n_skills", "n_splits")}

    def refuse(self, site: Site) -> str | None:
        for side, size in (("inputs", site.fan_in), ("outputs", site.out)):
            if size % self.config.n_splits:
                return f"n_splits={self.config.n_splits} does not divide its {size} {side}"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        config = self.config
        sizes: dict[str, Any] = {"q": config.n_splits, "s": config.n_skills, "r": config.r}
        sizes |= {"i": site.fan_in // config.n_splits, "o": site.out // config.n_splits}
        start = zeros if config.init_weights else _skills
        return {
            "A": site.slot("poly_lora_A.*", "q s i r", _skills, **sizes),
            "B": site.slot("poly_lora_B.*", "q s r o", start, **sizes),
            "logits": site.slot(
                "poly_router.*.module_logits",
                "t w",
                Uniform(1e-3),
                t=config.n_tasks,
                w=config.n_splits * config.n_skills,
            ),
        }

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        config = self.config
        tasks = inner.tasks(x)
        if tasks is None and config.n_tasks > 1:
            raise RoutingError(
                f"{site.name!r}: the adapter has {config.n_tasks} tasks, and none was chosen; pass task_ids with one "
                "for each sample"
            )
        if tasks is None:
            tasks = torch.zeros(len(x) if p.training else 1, dtype=torch.long, device=p.logits.device)
        elif not torch.compiler.is_compiling() and not 0 <= int(tasks.min()) <= int(tasks.max()) < config.n_tasks:
            raise RoutingError(f"task_ids: expected numbers below n_tasks={config.n_tasks}, found {tasks.tolist()}")
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
