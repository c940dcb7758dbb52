"""AdaLoRA: a LoRA in the form of a singular value decomposition, whose rank moves between layers (arXiv:2303.10512)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from inlay.config import PeftType, setting, settings
from inlay.core.affine import LowRank, Site
from inlay.core.kept_ranks import Pattern, all_ranks, left_of, rows_left, with_ranks, without_ranks
from inlay.core.lifecycle import Stepped, moving_importance
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Constant, Normal, Slot, zeros
from inlay.errors import StateError
from inlay.methods.lora import LoraConfig

__all__ = ["AdaLoRA", "AdaLoraConfig"]


@settings(positional="target_r init_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step")
class AdaLoraConfig(LoraConfig):
    """Configuration of AdaLoRA."""

    peft_type = PeftType.ADALORA

    target_r: int = setting(default=8, doc="Rank of a layer in the end, on average.", gt=0)
    init_r: int = setting(
        default=12,
        doc="Rank of each layer at the start; r is not read.",
        gt=0,
        parameters="init_r * (in + out + 1) a linear layer",
    )
    tinit: int = setting(default=0, doc="Steps before the ranks begin to fall.", ge=0)
    tfinal: int = setting(default=0, doc="Steps at the end in which the ranks stay.", ge=0)
    deltaT: int = setting(default=1, doc="Steps between two allocations of ranks.", gt=0)
    beta1: float = setting(default=0.85, doc="Decay of the moving mean of importance.", gt=0.0, lt=1.0)
    beta2: float = setting(default=0.85, doc="Decay of the moving mean of its uncertainty.", gt=0.0, lt=1.0)
    orth_reg_weight: float = setting(
        default=0.5, doc="Weight of the distance of A and B from orthogonal matrices in the loss.", ge=0.0
    )
    total_step: int | None = setting(default=None, doc="Steps of the whole training; has to be given.", gt=0)
    rank_pattern: dict[str, list[bool]] | None = setting(  # type: ignore[assignment]  # masks, not ranks
        default=None, doc="Which ranks of each layer are left; training writes it."
    )

    def check_fields(self) -> None:
        self.rank_pattern = self.rank_pattern or None
        if self.total_step is None:
            raise self.wrong("total_step", "expected the number of training steps, found None")
        if self.tinit >= self.total_step - self.tfinal:
            wanted = f"expected more than tinit + tfinal = {self.tinit + self.tfinal}"
            why = "so that there are steps in which ranks fall"
            raise self.wrong("total_step", f"{wanted}, {why}; found {self.total_step}")
        for field in _OTHERS:
            if getattr(self, field):
                raise self.wrong(field, "an option of LoRA that AdaLoRA has no use for; leave it out")
        if not isinstance(self.init_lora_weights, bool):
            found = f"found {self.init_lora_weights!r}; AdaLoRA has a start of its own"
            raise self.wrong("init_lora_weights", f"expected True or False, {found}")
        if self.r != 8:
            self.warn("r is not read; init_r is the rank at the start")
        if self.target_r > self.init_r:
            self.warn(f"target_r={self.target_r} is above init_r={self.init_r}, so no rank will be taken away")


_OTHERS = ("use_dora", "use_rslora", "lora_bias", "loftq_config", "alpha_pattern", "eva_config", "corda_config")


@register_method
class AdaLoRA(Method):
    """``alpha / init_r * B diag(E) A``; ranks of little importance lose their E, in all layers together."""

    config_class = AdaLoraConfig
    mixed = True
    prefix = "lora_"
    unread = ("r", "lora_alpha")
    dropout_field = "lora_dropout"
    config: AdaLoraConfig

    @property
    def identity(self) -> bool:
        return bool(self.config.init_lora_weights)

    def means(self, field: str, key: str, site: Site) -> bool:
        return left_of({key: []}, site.patterns or site.name) is not None

    def options(self, site: Site) -> dict[str, Any]:
        kept, full = left_of(self.config.rank_pattern, site.patterns or site.name), self.config.init_r
        alpha = self.config.lora_alpha
        r = full if kept is None else sum(kept)
        return {"r": r, "lora_alpha": alpha, "scaling": alpha if alpha > 0 else float(full)}

    def slots(self, site: Site) -> dict[str, Slot]:
        r, start = self.options(site)["r"], self.identity
        first: dict[str, Any] = {"discarded": Normal(1.0)} if start else {}
        drawn = Normal(0.02 if start else 1.0)
        fixed = {"trainable": False, "saved": False, **first}
        return {
            "A": site.slot("lora_A.*", "*experts r fan_in", drawn, options=first, r=r),
            "E": site.slot("lora_E.*", "*experts r 1", zeros if start else drawn, options=first, r=r),
            "B": site.slot("lora_B.*", "*experts out r", drawn, options=first, r=r),
            "ranks": site.slot("ranknum.*", "1", Constant(float(self.config.init_r)), options=fixed),
        }

    def delta(self, site: Site, p: P) -> LowRank:
        return LowRank(p.B, p.A * (p.E / (p.ranks + 1e-5)))

    def penalty(self, layers: Iterable[tuple[Site, P]]) -> Tensor | None:
        if not self.config.orth_reg_weight:
            return None
        errors = []
        for _, p in layers:
            for gram in (p.A @ p.A.mT, p.B.mT @ p.B):
                eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
                errors.append(torch.linalg.matrix_norm(gram - eye).reshape(-1))
        return self.config.orth_reg_weight * torch.cat(errors).mean()

    def step(self, adapter: Stepped, global_step: int) -> None:
        config = adapter.config
        last = config.total_step - config.tfinal
        if global_step < last:
            for site, p in adapter.layers:
                moving_importance(adapter.memory, site.name, (p.A, p.E, p.B), config.beta1, config.beta2)
        if global_step > last:
            self._mask(adapter, config.rank_pattern or {})
        elif global_step == last or (global_step > config.tinit and global_step % config.deltaT == 0):
            config.rank_pattern = self._allocate(adapter, global_step) or None
            if global_step == last:
                adapter.memory.clear()

    @staticmethod
    def budget(config: Any, total: int, layers: int, step: int) -> int:
        """Return how many ranks all layers together have left after a step (equation 9 of the paper)."""
        target = min(config.target_r * layers, total)
        left = 1 - (step - config.tinit) / (config.total_step - config.tfinal - config.tinit)
        return int((total - target) * left**3 + target)

    def _allocate(self, adapter: Stepped, step: int) -> dict[str, list[bool]]:
        """Take the least important ranks away; returns which are left."""
        if not adapter.memory:
            raise StateError(
                "AdaLoRA allocates ranks by gradients of earlier steps, and there was none; call it each step"
            )
        scores = []
        for site, _ in adapter.layers:
            A, E, B = (mean * unsure for mean, unsure in adapter.memory[site.name])
            scores.append((E.squeeze(-1) + A.mean(-1) + B.mean(-2)).flatten())
        everything = torch.cat(scores)
        total = everything.numel()
        matrices = sum(math.prod(site.experts) for site, _ in adapter.layers)
        kept = torch.ones_like(everything, dtype=torch.bool)
        kept[everything.argsort(stable=True)[: total - self.budget(adapter.config, total, matrices, step)]] = False
        found = {}
        for (site, p), mask in zip(adapter.layers, kept.split([one.numel() for one in scores]), strict=True):
            p.E.masked_fill_(~mask.view(p.E.shape), 0.0)
            if not site.experts:  # the experts of a bank keep one rank
                found[f"{site.name}.lora_E"] = all_ranks(self.config.rank_pattern, site.name, mask.tolist())
        return found

    def _mask(self, adapter: Stepped, pattern: Pattern) -> None:
        for site, p in adapter.layers:
            mask = rows_left(pattern, self.config.rank_pattern, site.name)
            if mask is not None:
                p.E.masked_fill_(~torch.tensor(mask, device=p.E.device).view(p.E.shape), 0.0)

    def pack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return without_ranks(config.rank_pattern, self.config.rank_pattern, tensors)

    def unpack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_ranks(config.rank_pattern, self.config.rank_pattern, tensors)
