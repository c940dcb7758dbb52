"""LoHa: an update that is the elementwise product of two low-rank ones (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.config import LayerFields, PatternFields, PeftConfig, PeftType, TargetFields, setting, settings
from inlay.core.affine import Delta, Dense, Hadamard, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.row_dropout import with_some_rows
from inlay.core.slot import KaimingUniform, Slot, zeros

if TYPE_CHECKING:
    from inlay.core.inner import Inner

__all__ = ["LoHa", "LoHaConfig"]


@settings(
    positional="rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d target_modules "
    "exclude_modules init_weights layers_to_transform layers_pattern modules_to_save"
)
class LoHaConfig(TargetFields, LayerFields, PatternFields, PeftConfig):
    """Configuration of LoHa."""

    peft_type = PeftType.LOHA

    r: int = setting(
        default=8,
        doc="Rank of each of the two factors; their product has a rank of up to r * r.",
        gt=0,
        parameters="proportional: 2 * r * (in + out) a linear layer",
    )
    alpha: int | float = setting(default=8, doc="Numerator of the scale alpha / r.")
    rank_dropout: float = setting(
        default=0.0,
        doc="Chance that a training forward leaves out a row of the update; the others grow in turn.",
        ge=0,
        lt=1,
    )
    module_dropout: float = setting(
        default=0.0, doc="Chance that a training forward leaves out a layer's update.", ge=0, lt=1
    )
    use_effective_conv2d: bool = setting(
        default=False,
        doc="Give kernels larger than 1 a tensor of their own (Tucker form) instead of flattening them.",
        parameters="a convolution has 2 * r * (r * kernel + in + out)",
    )
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise every factor is random.")


@register_method
class LoHa(Method):
    """``alpha / r * (A1 B1) * (A2 B2)``, elementwise; B2 starts at zero.

    With ``use_effective_conv2d`` each factor of a convolution is ``sum_ij T[i, j, kernel] A[i, out] B[j, in]``.
    """

    config_class = LoHaConfig
    prefix = "hada_"
    mixed = True
    shown = ("rank_dropout", "module_dropout")
    config: LoHaConfig

    def options(self, site: Site) -> dict[str, Any]:
        r = self.by_pattern("rank_pattern", site, self.config.r)
        alpha = self.by_pattern("alpha_pattern", site, self.config.alpha)
        return {"r": r, "alpha": alpha, "scaling": alpha / r}

    def tucker(self, site: Site) -> bool:
        """Whether kernels have a tensor of their own."""
        return self.config.use_effective_conv2d and math.prod(site.kernel) > 1

    def slots(self, site: Site) -> dict[str, Slot]:
        r, start = self.options(site)["r"], KaimingUniform()
        a, b = ("r out", "r in") if self.tucker(site) else ("*experts out r", "*experts r fan_in")
        slots = {
            "w1_a": site.slot("hada_w1_a.*", a, start, r=r),
            "w1_b": site.slot("hada_w1_b.*", b, start, r=r),
            "w2_a": site.slot("hada_w2_a.*", a, start, r=r),
            "w2_b": site.slot("hada_w2_b.*", b, zeros if self.config.init_weights else start, r=r),
        }
        if self.tucker(site):
            core = "r r *kernel 1" if len(site.kernel) == 1 else "r r *kernel"  # PEFT stores conv1d as flat conv2d
            slots |= {"t1": site.slot("hada_t1.*", core, start, r=r), "t2": site.slot("hada_t2.*", core, start, r=r)}
        return slots

    def delta(self, site: Site, p: P) -> Delta:
        if self.tucker(site):
            first = torch.einsum("ijk,io,jc->ock", p.t1.flatten(2), p.w1_a, p.w1_b)
            second = torch.einsum("ijk,io,jc->ock", p.t2.flatten(2), p.w2_a, p.w2_b)
            return Dense((first * second).flatten(1))
        return Hadamard(p.w1_a, p.w1_b, p.w2_a, p.w2_b)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        if p.training and self.config.rank_dropout > 0.0:
            return with_some_rows(x, inner, self.update(site, p), self.config.rank_dropout, rescale=True)
        return super().forward(site, p, x, inner)
