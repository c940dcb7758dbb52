"""LoRA: ``W + scaling * B @ A`` (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from inlay.config.lora import LoraConfig, LoraRuntimeConfig
from inlay.config.starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Slot, Uniform
from inlay.inits import Start, begin, start_of

__all__ = ["CordaConfig", "EvaConfig", "LoRA", "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraRuntimeConfig"]


@register_method
class LoRA(Method):
    """``W + s B A``, s = alpha / r (``use_rslora``: alpha / sqrt(r)); B starts at zero, so that nothing changes."""

    config_class = LoraConfig
    prefix = "lora_"
    dropout_field = "lora_dropout"
    mixed = True
    unread = ("r", "lora_alpha")  # the tensors have the rank, and the scale says the rest
    shown = ("use_dora", "use_rslora", "lora_bias")
    patterned = ("rank_pattern", "alpha_pattern")
    config: LoraConfig

    @classmethod
    def variant(cls, config: Any) -> type[Method]:
        from inlay.methods.variants import carried_out_by

        return carried_out_by(cls, config)

    @property
    def start(self) -> Start:
        """How the factors start."""
        return start_of(self.config.init_lora_weights)

    @property
    def identity(self) -> bool:
        return self.start.identity

    @property
    def needs_base(self) -> bool:
        return self.start.reads_base or type(self).prepare is not LoRA.prepare

    @property
    def rebases(self) -> bool:
        return self.start.changes_base

    @property
    def measured(self) -> tuple[str, ...]:
        return self.start.measured

    def options(self, site: Site) -> dict[str, Any]:
        r = self.by_pattern("rank_pattern", site, self.config.r)
        alpha = self.by_pattern("alpha_pattern", site, self.config.lora_alpha)
        return {"r": r, "lora_alpha": alpha, "scaling": alpha / (math.sqrt(r) if self.config.use_rslora else r)}

    def refuse(self, site: Site) -> str | None:
        numbers = self.options(site)
        r = numbers["r"]
        if r % site.groups:
            return f"a convolution of {site.groups} groups needs a rank that {site.groups} divides, found r={r}"
        if self.config.lora_bias and (site.lookup or site.parameter is not None):
            return "lora_bias needs a layer that can have a bias"
        return self.start.refuse(site, r // site.groups, numbers["scaling"])

    def note(self, site: Site) -> str | None:
        if self.config.lora_bias and not site.bias:
            return (
                "lora_bias trains a bias that the layer itself does not have, so the adapter cannot be merged into it"
            )
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        r = self.options(site)["r"]
        n = math.prod(site.experts) * r
        A, B = self.start.fills(site, r)
        drawn = self.start.discarded(site)
        down: dict[str, Any] = {} if drawn[0] is None else {"discarded": drawn[0]}
        up: dict[str, Any] = {} if drawn[1] is None else {"discarded": drawn[1]}
        up["trainable"] = self.start.trains_up
        if site.lookup:
            return {
                "A": site.slot("lora_embedding_A.*", "r in", A, options=down, r=r),
                "B": site.slot("lora_embedding_B.*", "out r", B, options=up, r=r),
            }
        # each group of outputs, and each expert, has a part of A's rank axis to itself
        down |= {"leaf": "down", "blocks": site.groups * (n // r)}
        rank = n // site.groups
        slots = {
            "A": site.slot("lora_A.*.weight", "r all_in *kernel", A, options=down, r=n),
            "B": site.slot("lora_B.*.weight", "out r *ones", B, options={"leaf": "up", **up}, r=rank),
        }
        if self.config.lora_bias:
            first = {} if drawn[1] is None else {"discarded": Uniform(1 / math.sqrt(rank))}
            slots["bias"] = site.slot("lora_B.*.bias", "out", options={"leaf": "up", **first})
        return slots

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine | None:
        return begin(self.start, self.config, site, p, layer) if self.start.reads_base else None

    def delta(self, site: Site, p: P) -> LowRank:
        A, B = self.pair(site, p)
        return LowRank(B, A, p.get("bias"), site.groups)

    def pair(self, site: Site, p: P) -> tuple[Tensor, Tensor]:
        """Return A as (*experts, r, fan_in) and B as (*experts, out, r)."""
        return self.factors(site, p.A, p.B)

    def spread(self, site: Site) -> float:
        """Return the squared norm of A as it is applied, over that of A as it is stored."""
        return 1.0

    def made_of(self, p: P) -> tuple[Tensor, ...]:
        """Return the tensors that the update is made of."""
        return p.A, p.B

    @staticmethod
    def factors(site: Site, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return stored factors as matrices, as :meth:`pair` does.

        A bank keeps its experts packed in the rank axis: slowest in A, fastest in B.
        """
        if site.experts:
            n = math.prod(site.experts)
            B = B.view(B.shape[0], -1, n).permute(2, 0, 1)
            return A.view(n, -1, A.shape[1]).view(*site.experts, -1, A.shape[1]), B.reshape(*site.experts, *B.shape[1:])
        return site.matrix(A), site.matrix(B)
