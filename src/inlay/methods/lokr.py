"""LoKr: an update that is a Kronecker product of two small matrices (Yeh et al. 2023, arXiv:2309.14859)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from inlay.config import LayerFields, PatternFields, PeftConfig, PeftType, TargetFields, setting, settings
from inlay.core.affine import Delta, Dense, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.row_dropout import with_some_rows
from inlay.core.slot import KaimingUniform, Slot, zeros
from inlay.core.structured import Kron

if TYPE_CHECKING:
    from inlay.core.inner import Inner

__all__ = ["LoKr", "LoKrConfig"]


@settings(
    positional="rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d decompose_both "
    "decompose_factor rank_dropout_scale target_modules exclude_modules init_weights layers_to_transform "
    "layers_pattern modules_to_save"
)
class LoKrConfig(TargetFields, LayerFields, PatternFields, PeftConfig):
    """Configuration of LoKr."""

    peft_type = PeftType.LOKR

    r: int = setting(
        default=8,
        doc="Rank of a factor; one that has few rows or columns as it is stays whole.",
        gt=0,
        parameters="about 2 * r * sqrt(in) and the small factor, a linear layer",
    )
    alpha: int | float = setting(default=8, doc="Numerator of the scale alpha / r.")
    rank_dropout: float = setting(
        default=0.0, doc="Chance that a training forward leaves out a row of the update.", ge=0, lt=1
    )
    module_dropout: float = setting(
        default=0.0, doc="Chance that a training forward leaves out the update of a layer.", ge=0, lt=1
    )
    use_effective_conv2d: bool = setting(
        default=False,
        doc="Give kernels larger than 1 a tensor of their own (Tucker form) beside the low-rank factor.",
        parameters="a convolution has r * (r * kernel + rows + columns) in its large factor",
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


def split(size: int, wish: int) -> tuple[int, int]:
    """Return two numbers whose product is ``size``; the first is ``wish``, or what comes nearest from below.

    Without a wish (-1), or with one that does not divide, the first is not larger than the second.
    """
    if wish > 0 and size % wish == 0:
        return wish, size // wish
    limit = min(math.isqrt(size), wish if wish > 0 else size)
    first = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return first, size // first


@register_method
class LoKr(Method):
    """``alpha / r * kron(w1, w2)``: w2 is ``w2_a w2_b`` unless r is large, w1 is whole unless both are decomposed."""

    config_class = LoKrConfig
    prefix = "lokr_"
    mixed = True
    shown = ("rank_dropout", "module_dropout", "rank_dropout_scale")
    patterned = ("rank_pattern", "alpha_pattern")
    config: LoKrConfig

    def options(self, site: Site) -> dict[str, Any]:
        r = self.by_pattern("rank_pattern", site, self.config.r)
        alpha = self.by_pattern("alpha_pattern", site, self.config.alpha)
        return {"r": r, "alpha": alpha, "scaling": alpha / r}

    def slots(self, site: Site) -> dict[str, Slot]:
        config, r, area = self.config, self.options(site)["r"], math.prod(site.kernel)
        (a, b), (c, d) = (split(size, config.decompose_factor) for size in (site.out, site.channels))
        tucker = config.use_effective_conv2d and area > 1
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
        elif tucker:
            dims |= {"w2_a": "r b", "w2_b": "r d", "t2": "r r *kernel 1" if len(site.kernel) == 1 else "r r *kernel"}
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

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        config = self.config
        if p.training and config.rank_dropout > 0.0:
            return with_some_rows(x, inner, self.update(site, p), config.rank_dropout, config.rank_dropout_scale)
        return super().forward(site, p, x, inner)
