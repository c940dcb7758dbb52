"""Uni-LoRA: every factor of every layer is read from one trained vector (Li et al. 2025, arXiv:2506.00799)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from inlay.config import (
    FanInFanOutField,
    LayerFields,
    PeftConfig,
    PeftType,
    SavedModulesField,
    TargetField,
    bias_setting,
    setting,
    settings,
)
from inlay.core.affine import LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot, Uniform
from inlay.errors import MissingExtraError, StateError

__all__ = ["UniLoRA", "UniLoraConfig"]


@settings(
    positional="r proj_seed theta_d_length target_modules unilora_dropout fan_in_fan_out bias modules_to_save "
    "init_theta_d_bound init_weights save_indices layers_to_transform layers_pattern"
)
class UniLoraConfig(TargetField, SavedModulesField, LayerFields, FanInFanOutField, PeftConfig):
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


class Assignment:
    """Which element of the vector each element of each factor is: every one is used equally often, give or take one.

    Attributes:
        starts: where a site's factors begin among all of them, A before B.
        total: how many elements they have together.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.starts: dict[str, int] = {}
        self.total = 0
        self._drawn: Tensor | None = None

    def place(self, sites: list[Site], r: int) -> None:
        """Lay the factors of all sites out, one after the other."""
        self.starts, self.total, self._drawn = {}, 0, None
        for site in sites:
            self.starts[site.name] = self.total
            self.total += r * (site.fan_in + site.out) * math.prod(site.experts)

    def draw(self) -> Tensor:
        """Return the element for each place, as PEFT draws it, with NumPy."""
        try:
            import numpy
        except ImportError as error:
            raise MissingExtraError("Uni-LoRA's assignment is drawn with NumPy: pip install numpy") from error
        if self._drawn is None:
            stream = numpy.random.default_rng(self.seed)
            times, rest = divmod(self.total, self.length)
            all_of_them = numpy.repeat(numpy.arange(self.length), times)
            if rest:
                all_of_them = numpy.concatenate([all_of_them, stream.choice(self.length, size=rest, replace=False)])
            stream.shuffle(all_of_them)
            self._drawn = torch.as_tensor(all_of_them, dtype=torch.long)
        return self._drawn

    def take(self, site: str, skip: int, count: int, scales: bool) -> Tensor:
        """Return ``count`` elements of a site's factors, or the scales that make the whole map an isometry."""
        if site not in self.starts:
            raise StateError(f"{site!r} is none of the layers that the assignment was laid out for")
        drawn, start = self.draw(), self.starts[site] + skip
        taken = drawn[start : start + count]
        if scales:
            taken = drawn.bincount(minlength=self.length).float().rsqrt()[taken]
            if start + count == self.total:
                self._drawn = None  # the last one asked for; it is as large as all factors together
        return taken


class Assigned:
    """Fill with a part of an assignment."""

    def __init__(self, assignment: Assignment, site: str, skip: int, scales: bool = False) -> None:
        self.assignment, self.site, self.skip, self.scales = assignment, site, skip, scales

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(self.assignment.take(self.site, self.skip, tensor.numel(), self.scales).view(tensor.shape))


@register_method
class UniLoRA(Method):
    """``B A`` is added to W, ``A_ij = theta[index_ij] / sqrt(n[index_ij])``, B alike; n counts an element's uses."""

    config_class = UniLoraConfig
    prefix = "unilora_"
    dropout_field = "unilora_dropout"
    config: UniLoraConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.assignment = Assignment(config.theta_d_length, config.proj_seed)

    @property
    def identity(self) -> bool:
        return False

    def options(self, site: Site) -> dict[str, Any]:
        return {"r": self.config.r}

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        if not sites:
            return {}
        self.assignment.place(sites, self.config.r)
        start = Uniform(self.config.init_theta_d_bound) if self.config.init_weights else Normal(1.0)
        return {"theta": Slot("unilora_theta_d.*", (self.config.theta_d_length,), ("n",), start)}

    def slots(self, site: Site) -> dict[str, Slot]:
        fixed: dict[str, Any] = {"buffer": True, "trainable": False, "saved": self.config.save_indices}
        before_B = self.config.r * site.fan_in * math.prod(site.experts)
        slots = {}
        for scales, kind in ((False, "indices"), (True, "scales")):
            options = fixed if scales else {**fixed, "dtype": torch.int64}
            for factor, dims, skip in (("A", "r fan_in", 0), ("B", "out r", before_B)):
                init = Assigned(self.assignment, site.name, skip, scales)
                slots[f"{kind}_{factor}"] = site.slot(
                    f"unilora_{kind}_{factor}.*", f"*experts {dims}", init, options=options, r=self.config.r
                )
        return slots

    def delta(self, site: Site, p: P) -> LowRank:
        return LowRank(self.read(p.theta, p.indices_B, p.scales_B), self.read(p.theta, p.indices_A, p.scales_A))

    @staticmethod
    def read(theta: Tensor, index: Tensor, scales: Tensor) -> Tensor:
        return theta.index_select(0, index.flatten()).view(index.shape) * scales
