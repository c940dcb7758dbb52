"""LoKr: an update that is a Kronecker product of two small matrices (Yeh et al. 2023, arXiv:2309.14859)."""

from __future__ import annotations

import math
from typing import Literal

import torch

from inlay.config import LycorisFields, PeftConfig, PeftType, setting, settings
from inlay.core.affine import Delta, Dense, Site
from inlay.core.divisors import two_factors
from inlay.core.method import P
from inlay.core.registry import register_method
from inlay.core.row_dropout import RowDropout
from inlay.core.slot import KaimingUniform, Slot, zeros
from inlay.core.structured import Kron

__all__ = ["LoKr", "LoKrConfig"]


@settings(
    positional="rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d decompose_both "
    "decompose_factor rank_dropout_scale target_modules exclude_modules init_weights layers_to_transform "
    "layers_pattern modules_to_save"
)
class LoKrConfig(LycorisFields, PeftConfig):
    """Configuration of LoKr."""

    peft_type = PeftType.LOKR

    r: int = setting(
        default=8,
        doc="Rank of a factor; one that has few rows or columns as it is stays whole.",
        gt=0,
        parameters="about 2 * r * sqrt(in) and the small factor, a linear layer",
    )
    decompose_both: bool = setting(
        default=False, doc="Give the small factor a low rank too.", parameters="fewer where r is small"
    )
    decompose_factor: int = setting(
        default=-1,
        doc="Rows and columns of the small factor, as nearly as they divide; -1 for factors of like size.",
        check=lambda value: None if value == -1 or value > 0 else "-1 or a positive number",
        parameters="the small factor has about that number squared",
    )
    rank_dropout_scale: bool = setting(default=False, doc="Let the rows that rank_dropout keeps grow in turn.")
    init_weights: bool | Literal["lycoris"] = setting(
        default=True,
        doc="Start from no change, by a small factor of zeros (True) or a large one ('lycoris'); otherwise at random.",
    )


@register_method
class LoKr(RowDropout):
    """``alpha / r * kron(w1, w2)``: w2 is ``w2_a w2_b`` unless r is large, w1 is whole unless both are decomposed."""

    config_class = LoKrConfig
    prefix = "lokr_"
    shown = ("rank_dropout", "module_dropout", "rank_dropout_scale")
    patterned = ("rank_pattern", "alpha_pattern")
    config: LoKrConfig

    def slots(self, site: Site) -> dict[str, Slot]:
        config, r, area = self.config, self.number("r", site), math.prod(site.kernel)
        (a, b), (c, d) = (two_factors(size, config.decompose_factor) for size in (site.out, site.channels))
        still = {True: ("w1", "w1_a"), "lycoris": ("w2", "w2_b")}.get(config.init_weights, ())

        def slot(role: str, dims: str) -> Slot:
            fan = site.shape(" ".join(dims.split()[1:]), **sizes)[0]
            start = zeros if role in still else KaimingUniform(fan=math.prod(fan))
            return site.slot(f"lokr_{role}.*", f"*experts {dims}", start, **sizes)

        sizes = {"r": r, "a": a, "b": b, "c": c, "d": d, "d_area": d * area}
        if config.decompose_both and r < max(a, c) / 2:
            dims = {"w1_a": "a r", "w1_b": "r c"}
        else:
            dims = {"w1": "a c"}
        if r >= max(b, d) / 2:
            dims |= {"w2": "b d *kernel"}
        elif core := self.kernel_dims(site):
            dims |= {"w2_a": "r b", "w2_b": "r d", "t2": core}
        else:
            dims |= {"w2_a": "b r", "w2_b": "r d_area"}
        return {role: slot(role, text) for role, text in dims.items()}

    def delta(self, site: Site, p: P) -> Delta:
        w1, w2, core = p.get("w1"), p.get("w2"), p.get("t2")
        left = p.w1_a @ p.w1_b if w1 is None else w1
        if w2 is not None:
            if len(site.kernel) == 1:  # PEFT's checkpoints mean the product that has the vector of the kernel last
                return Dense(torch.kron(left, w2).reshape(site.out, site.fan_in))
            return Kron(left, site.matrix(w2))
        if core is not None:
            return Kron(left, torch.einsum("ijk,ib,jd->bdk", core.flatten(2), p.w2_a, p.w2_b).flatten(1))
        return Kron(left, p.w2_a @ p.w2_b)
