"""RoAd: rotate and stretch pairs of a layer's outputs (Liao and Monz 2024, arXiv:2409.00119)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from inlay.config import PeftConfig, PeftType, SavedModulesField, TargetField, setting, settings
from inlay.core.affine import Affine, Site
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Constant, Normal, Slot, zeros
from inlay.parallel.tensors import in_blocks

__all__ = ["RoAd", "RoadConfig"]

# numbers of each kind for an output feature, times two
_COUNTS = {"road_1": 1, "road_2": 2, "road_4": 4}


def _even(number: int) -> str | None:
    return "an even number" if number % 2 else None


@settings(positional="variant group_size init_weights target_modules modules_to_save")
class RoadConfig(TargetField, SavedModulesField, PeftConfig):
    """Configuration of RoAd."""

    peft_type = PeftType.ROAD

    variant: str = setting(
        default="road_1",
        doc="Angles and scales: one for each pair of outputs (road_1), for each output (road_2), or two for each "
        "output (road_4).",
        choices=tuple(_COUNTS),
        parameters="out (road_1), 2 * out (road_2) or 4 * out (road_4) a layer",
    )
    group_size: int = setting(
        default=64,
        doc="Outputs in a group; each of its first half makes a pair with one of its second half.",
        gt=0,
        check=_even,
    )
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise from random angles and scales.")


@register_method
class RoAd(Method):
    """``R (W x + b)``: a pair of outputs (y, z) becomes ``a (cos(t) y - sin(t) z)`` and ``a (sin(t) y + cos(t) z)``.

    road_2 has an angle t and a scale a for each row of R, and road_4 for each of its entries.
    """

    config_class = RoadConfig
    prefix = "road_"
    numbers = ("variant", "group_size")
    config: RoadConfig

    def refuse(self, site: Site) -> str | None:
        size = self.config.group_size
        if site.elementwise:
            return "a norm multiplies each feature by itself, and a rotation mixes them"
        if site.out % size:
            return f"its {site.out} outputs cannot be cut into groups of group_size={size}"
        if site.out // site.groups % size:
            return (
                f"group_size={size} reaches across the groups of the convolution, whose weight cannot hold that; take "
                f"one that divides {site.out // site.groups}"
            )
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        n = site.out * _COUNTS[self.config.variant] // 2
        start = self.config.init_weights
        return {
            "theta": site.slot("road_theta.*", "*experts n", zeros if start else Normal(0.5), n=n),
            "alpha": site.slot("road_alpha.*", "*experts n", Constant(1.0) if start else Normal(0.5, mean=1.0), n=n),
        }

    def factors(self, p: P) -> tuple[Tensor, Tensor]:
        """Return what every output and its partner are multiplied by, (*experts, groups, group_size) each."""
        size = p.group_size
        if p.variant == "road_4":
            theta, alpha = (t.unflatten(-1, (-1, 2, size)) for t in (p.theta, p.alpha))
            return alpha[..., 0, :] * theta[..., 0, :].cos(), alpha[..., 1, :] * theta[..., 1, :].sin()
        theta, alpha = p.theta, p.alpha
        if p.variant == "road_1":
            halves = (t.unflatten(-1, (-1, 1, size // 2)) for t in (theta, alpha))
            theta, alpha = (torch.cat((half, half), dim=-2).flatten(-3) for half in halves)
        return (alpha * theta.cos()).unflatten(-1, (-1, size)), (alpha * theta.sin()).unflatten(-1, (-1, size))

    def turned(self, p: P, y: Tensor) -> Tensor:
        """Rotate the last axis of ``y``."""
        factors = (f if f.dim() == 2 else f.unsqueeze(-3) for f in self.factors(p))  # experts have rows of their own
        return in_blocks(y, p.group_size, partial(_turned, *factors))

    def delta_weight(self, site: Site, p: P, base: Affine) -> Tensor:
        return self.turned(p, torch.eye(site.out, dtype=p.theta.dtype, device=p.theta.device)).mT

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        return Affine(self.turned(p, layer.weight.mT).mT, None if layer.bias is None else self.turned(p, layer.bias))

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        return site.channels_back(self.turned(p, site.channels_last(y))).to(y.dtype)


def _turned(first: Tensor, second: Tensor, y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return y * first + torch.cat((-b, a), dim=-1) * second
