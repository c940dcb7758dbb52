"""LoHa: an update that is the elementwise product of two low-rank ones (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

from __future__ import annotations

import torch

from inlay.config import LycorisFields, PeftConfig, PeftType, setting, settings
from inlay.core.affine import Delta, Dense, Site
from inlay.core.method import P
from inlay.core.registry import register_method
from inlay.core.row_dropout import RowDropout
from inlay.core.slot import KaimingUniform, Slot
from inlay.core.structured import Hadamard

__all__ = ["LoHa", "LoHaConfig"]


@settings(
    positional="rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d target_modules "
    "exclude_modules init_weights layers_to_transform layers_pattern modules_to_save"
)
class LoHaConfig(LycorisFields, PeftConfig):
    """Configuration of LoHa."""

    peft_type = PeftType.LOHA

    r: int = setting(
        default=8,
        doc="Rank of each of the two factors; their product has a rank of up to r * r.",
        gt=0,
        parameters="proportional: 2 * r * (in + out) a linear layer",
    )
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise every factor is random.")


@register_method
class LoHa(RowDropout):
    """``alpha / r * (A1 B1) * (A2 B2)``, elementwise; B2 starts at zero.

    With ``use_effective_conv2d`` each factor of a convolution is ``sum_ij T[i, j, kernel] A[i, out] B[j, in]``. Rows
    that ``rank_dropout`` keeps grow in turn.
    """

    config_class = LoHaConfig
    prefix = "hada_"
    shown = ("rank_dropout", "module_dropout")
    config: LoHaConfig

    def slots(self, site: Site) -> dict[str, Slot]:
        r, start, core = self.number("r", site), KaimingUniform(), self.kernel_dims(site)
        a, b = ("r out", "r in") if core else ("*experts out r", "*experts r fan_in")
        slots = {
            "w1_a": site.slot("hada_w1_a.*", a, start, r=r),
            "w1_b": site.slot("hada_w1_b.*", b, start, r=r),
            "w2_a": site.slot("hada_w2_a.*", a, start, r=r),
            "w2_b": site.slot("hada_w2_b.*", b, self.still_or(start), r=r),
        }
        if core:
            slots |= {"t1": site.slot("hada_t1.*", core, start, r=r), "t2": site.slot("hada_t2.*", core, start, r=r)}
        return slots

    def delta(self, site: Site, p: P) -> Delta:
        if self.kernel_dims(site):
            first = torch.einsum("ijk,io,jc->ock", p.t1.flatten(2), p.w1_a, p.w1_b)
            second = torch.einsum("ijk,io,jc->ock", p.t2.flatten(2), p.w2_a, p.w2_b)
            return Dense((first * second).flatten(1))
        return Hadamard(p.w1_a, p.w1_b, p.w2_a, p.w2_b)
