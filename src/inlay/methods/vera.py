"""VeRA: one frozen random pair A, B for all layers, two trained vectors for each (Kopiczko et al. 2023, 2310.11454)."""

from __future__ import annotations

from typing import Any, ClassVar

from inlay.config import PeftConfig, PeftType, ProjectionFields, bias_setting, dropout_setting, setting, settings
from inlay.core.affine import LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Constant, KaimingUniform, Normal, Seeded, Slot, zeros

__all__ = ["VeRA", "VeraConfig"]


@settings(
    positional="r target_modules projection_prng_key save_projection vera_dropout d_initial fan_in_fan_out bias "
    "modules_to_save init_weights layers_to_transform layers_pattern"
)
class VeraConfig(ProjectionFields, PeftConfig):
    """Configuration of VeRA."""

    peft_type = PeftType.VERA

    r: int = setting(default=256, doc="Rank of the shared projections.", gt=0, parameters="r + out a layer")
    vera_dropout: float = dropout_setting()
    d_initial: float = setting(default=0.1, doc="What the factors inside the update start from.")
    bias: str = bias_setting("vera")
    init_weights: bool = setting(
        default=True, doc="Start from no change; otherwise the outer factors are 1, the inner random."
    )


@register_method
class VeRA(Method):
    """``diag(b) B diag(d) A`` is added to W: A and B are the corner that fits the layer; b starts at zero."""

    config_class: ClassVar[type[Any]] = VeraConfig
    prefix = "vera_lambda_"
    dropout_field = "vera_dropout"
    numbers = ("r",)
    config: Any

    @property
    def stem(self) -> str:
        """What the names of tensors start with."""
        return self.prefix.partition("_")[0]

    @property
    def rows(self) -> int:
        """Rows of A, one for each number that d scales."""
        return int(self.config.r)

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        if not sites:
            return {}
        key = self.config.projection_prng_key
        start = KaimingUniform(a=0.0)  # as PEFT draws them: A first, then B from the same stream
        fixed: dict[str, Any] = {"buffer": True, "trainable": False, "saved": self.config.save_projection}
        down, up = (self.rows, max(site.fan_in for site in sites)), (max(site.out for site in sites), self.config.r)
        return {
            "A": Slot(f"{self.stem}_A.*", down, ("r", "fan_in"), Seeded(key, start), **fixed),
            "B": Slot(f"{self.stem}_B.*", up, ("out", "r"), Seeded(key, start, skip=down), **fixed),
        }

    def slots(self, site: Site) -> dict[str, Slot]:
        start = self.config.init_weights
        outer, inner = (zeros, Constant(self.config.d_initial)) if start else (Constant(1.0), Normal(1.0))
        return {
            "b": site.slot(f"{self.prefix}b.*", "*experts out", outer),
            "d": site.slot(f"{self.prefix}d.*", "*experts r", inner, r=self.rows),
        }

    def delta(self, site: Site, p: P) -> LowRank:
        A, B = p.A[:, : site.fan_in], p.B[: site.out]
        return LowRank(p.b.unsqueeze(-1) * B, p.d.unsqueeze(-1) * A)
