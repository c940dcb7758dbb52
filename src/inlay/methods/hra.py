"""HRA: reflect what a layer reads at a few planes, one after the other (Yuan et al. 2024, arXiv:2405.17484)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import BlockTargetFields, PeftConfig, PeftType, bias_setting, setting, settings
from inlay.core.affine import Affine, Site
from inlay.core.dtype import merge_dtype
from inlay.core.fills import Doubled
from inlay.core.method import P
from inlay.core.registry import register_method
from inlay.core.rotation import InputRotation, Reflections, Rotation
from inlay.core.slot import KaimingUniform, Slot

__all__ = ["HRA", "HRAConfig"]


@settings(
    positional="r apply_GS target_modules exclude_modules init_weights layers_to_transform layers_pattern bias "
    "modules_to_save"
)
class HRAConfig(BlockTargetFields, PeftConfig):
    """Configuration of HRA."""

    peft_type = PeftType.HRA

    r: int = setting(
        default=8,
        doc="Number of reflections; an even number of them can start from no change.",
        gt=0,
        parameters="r * in a layer",
    )
    apply_GS: bool = setting(
        default=False, doc="Reflect at one space that the vectors span together, so the start always is a change."
    )
    init_weights: bool = setting(
        default=True, doc="Start from no change, as pairs of equal reflections; otherwise from random ones."
    )
    bias: str = bias_setting("hra")


@register_method
class HRA(InputRotation):
    """``W H_0 ... H_(r-1)``, ``H = I - 2 u u^T / |u|^2``; with ``apply_GS`` ``W (I - 2 P)``, P the projection on all u.

    The product is ``I - U T U^T`` with a triangular T, whose inverse is the upper half of ``U^T U``, its diagonal
    halved (Joffrain et al. 2006); no matrix of the width of the layer is made.
    """

    config_class = HRAConfig
    prefix = "hra_"
    config: HRAConfig

    @property
    def paired(self) -> bool:
        """Whether fresh reflections take each other back."""
        return self.config.init_weights and self.config.r % 2 == 0 and not self.config.apply_GS

    @property
    def identity(self) -> bool:
        return self.paired

    def options(self, site: Site) -> dict[str, Any]:
        return {"hra_r": self.config.r, "hra_apply_GS": self.config.apply_GS}

    def refuse(self, site: Site) -> str | None:
        features, r = self.features(site), self.config.r
        reason = self.unrotatable(site, features)
        if reason is None and self.config.apply_GS and r > features:
            return f"no {r} vectors of {features} features are orthogonal to each other; take an r of up to {features}"
        return reason

    def note(self, site: Site) -> str | None:
        if not self.config.init_weights or self.paired:
            return None
        reason = "apply_GS takes each direction once" if self.config.apply_GS else f"r={self.config.r} is odd"
        return f"reflections start from no change as equal pairs, and {reason}; the start is a random change"

    def slots(self, site: Site) -> dict[str, Slot]:
        r = self.config.r
        init = Doubled(KaimingUniform(fan=r // 2)) if self.paired else KaimingUniform(fan=r)
        return {"u": site.slot("hra_u.*", "*experts n r", init, n=self.features(site), r=r)}

    def rotation(self, site: Site, p: P) -> Rotation:
        U = p.u.to(merge_dtype(p.u.dtype))
        if p.hra_apply_GS:
            U, _ = torch.linalg.qr(U)
            return Reflections(U, torch.diag_embed(torch.full_like(U[..., 0, :], 2.0)))
        G = U.mT @ U
        T = torch.linalg.inv(G.triu() - 0.5 * torch.diag_embed(G.diagonal(dim1=-2, dim2=-1)))
        return Reflections(U, T).transposed  # the layer reads x R^T where its weight is W R

    def delta_weight(self, site: Site, p: P, base: Affine) -> Tensor:
        return self.rotation(site, p).transposed.matrix(self.features(site))
