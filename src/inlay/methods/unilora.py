"""Uni-LoRA: every factor of every layer is read from one trained vector (Li et al. 2025, arXiv:2506.00799)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inlay.config import MatrixTargetField, PeftConfig, PeftType, bias_setting, setting, settings
from inlay.core.affine import LowRank, Site
from inlay.core.assignment import Assigned, Assignment
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot, Uniform

__all__ = ["UniLoRA", "UniLoraConfig"]


@settings(
    positional="r proj_seed theta_d_length target_modules unilora_dropout fan_in_fan_out bias modules_to_save "
    "init_theta_d_bound init_weights save_indices layers_to_transform layers_pattern"
)
class UniLoraConfig(MatrixTargetField, PeftConfig):
    """Configuration of Uni-LoRA."""

    peft_type = PeftType.UNILORA

    r: int = setting(default=4, doc="Rank.", gt=0)
    proj_seed: int = setting(default=42, doc="Seed of the assignment of factors to the vector's elements.", ge=0)
    theta_d_length: int = setting(default=256, doc="Length of the vector.", gt=0, parameters="that many in all")
    unilora_dropout: float = setting(default=0.0, doc="Chance that the factors do not see an input.", ge=0, le=1)
    bias: str = bias_setting("unilora")
    init_theta_d_bound: float = setting(default=0.02, doc="The vector starts uniformly between -this and this.", gt=0)
    init_weights: bool = setting(default=True, doc="Start as said; otherwise from a standard normal distribution.")
    save_indices: bool = setting(
        default=False, doc="Keep the assignment and its scales in the checkpoint; otherwise they follow from the seed."
    )


@register_method
class UniLoRA(Method):
    """``B A`` is added to W, ``A_ij = theta[index_ij] / sqrt(n[index_ij])``, B alike; n counts an element's uses."""

    config_class = UniLoraConfig
    prefix = "unilora_"
    dropout_field = "unilora_dropout"
    identity = False
    numbers = ("r",)
    config: UniLoraConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.assignment = Assignment(config.theta_d_length, config.proj_seed)

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        if not sites:
            return {}
        self.assignment.place(sites, self.config.r)
        start = Uniform(self.config.init_theta_d_bound) if self.config.init_weights else Normal(1.0)
        return {"theta": Slot("unilora_theta_d.*", (self.config.theta_d_length,), ("n",), start)}

    def slots(self, site: Site) -> dict[str, Slot]:
        before_B = self.config.r * site.fan_in * math.prod(site.experts)
        slots = {}
        for scales, kind in ((False, "indices"), (True, "scales")):
            for factor, dims, skip in (("A", "r fan_in", 0), ("B", "out r", before_B)):
                init = Assigned(self.assignment, site.name, skip, scales)
                key, dtype = f"unilora_{kind}_{factor}.*", None if scales else torch.int64
                slots[f"{kind}_{factor}"] = site.constant(
                    key, f"*experts {dims}", init, saved=self.config.save_indices, dtype=dtype, r=self.config.r
                )
        return slots

    def delta(self, site: Site, p: P) -> LowRank:
        return LowRank(self.read(p.theta, p.indices_B, p.scales_B), self.read(p.theta, p.indices_A, p.scales_A))

    @staticmethod
    def read(theta: Tensor, index: Tensor, scales: Tensor) -> Tensor:
        return theta.index_select(0, index.flatten()).view(index.shape) * scales
