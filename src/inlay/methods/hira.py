"""HiRA: scale every weight by its own factor, the factors being of low rank (Huang et al. 2025, ICLR, TwJrTz9cRS)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from inlay.config import MatrixTargetFields, PeftConfig, PeftType, RankPatternField, dropout_setting, setting, settings
from inlay.core.affine import Affine, Site
from inlay.core.method import P
from inlay.core.reading import Modulated, ReadsBase
from inlay.core.registry import register_method
from inlay.core.slot import Init, KaimingUniform, Normal, Slot, zeros

__all__ = ["HiRA", "HiraConfig"]


@settings(
    positional="r target_modules exclude_modules hira_dropout fan_in_fan_out modules_to_save init_weights "
    "layers_to_transform layers_pattern rank_pattern"
)
class HiraConfig(MatrixTargetFields, RankPatternField, PeftConfig):
    """Configuration of HiRA."""

    peft_type = PeftType.HIRA

    r: int = setting(
        default=32, doc="Rank of the factors.", gt=0, parameters="proportional: r * (in + out) a linear layer"
    )
    hira_dropout: float = dropout_setting()
    init_weights: bool | Literal["gaussian"] | None = setting(
        default=True,
        doc="Start from no change, with Kaiming's or with normal ('gaussian') values in the factor that is not zero; "
        "otherwise both factors are random.",
    )


@register_method
class HiRA(ReadsBase):
    """``W * (B A)`` is added to W, elementwise; W is the untouched weight, and B starts at zero."""

    config_class = HiraConfig
    prefix = "hira_"
    dropout_field = "hira_dropout"
    numbers = ("r",)
    patterned = ("rank_pattern",)
    config: HiraConfig

    def slots(self, site: Site) -> dict[str, Slot]:
        r, noise, start = self.number("r", site), Normal(1.0), self.config.init_weights
        up = "out r *ones" if site.kernel else "*experts out r"
        down = "r in *kernel" if site.kernel else "*experts r in"
        name = "hira_embedding_" if site.lookup else "hira_"
        a, b = self.starts(site, r) if start else (noise, noise)
        drawn = {"discarded": noise if start else None}
        return {
            "A": site.slot(f"{name}A.*", down, a, options=drawn, r=r),
            "B": site.slot(f"{name}B.*", up, b, options=drawn, r=r),
        }

    def starts(self, site: Site, r: int) -> tuple[Init, Init]:
        """Return what A and B start from if nothing is to change."""
        if site.lookup:
            return zeros, Normal(1.0)
        gaussian = self.config.init_weights == "gaussian" and not site.kernel
        return Normal(1 / r) if gaussian else KaimingUniform(fan=site.fan_in), zeros

    def delta_weight(self, site: Site, p: P, base: Affine) -> Tensor:
        return site.to_stored(site.matrix(p.B) @ site.matrix(p.A))  # PEFT's is the factor of the weight

    def change(self, site: Site, p: P, base: Affine) -> Modulated:
        return Modulated(base.weight, site.matrix(p.B), site.matrix(p.A))
