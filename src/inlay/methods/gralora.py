"""GraLoRA: a grid of blocks, each of low rank (Jung et al. 2025, arXiv:2505.20355)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inlay.config import MatrixTargetField, PeftConfig, PeftType, bias_setting, dropout_setting, setting, settings
from inlay.core.affine import Delta, Dense, LowRank, Site
from inlay.core.divisors import undivided
from inlay.core.fills import Transposed
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import KaimingUniform, Slot
from inlay.core.structured import BlockLowRank

__all__ = ["GraLoRA", "GraloraConfig"]


@settings(
    positional="r hybrid_r target_modules alpha gralora_dropout gralora_k fan_in_fan_out bias modules_to_save "
    "init_weights layers_to_transform layers_pattern"
)
class GraloraConfig(MatrixTargetField, PeftConfig):
    """Configuration of GraLoRA."""

    peft_type = PeftType.GRALORA

    r: int = setting(
        default=32,
        doc="Rank of a row of blocks, r / gralora_k for each.",
        gt=0,
        parameters="r * (in + out) a layer",
    )
    hybrid_r: int = setting(
        default=0, doc="Rank of a plain LoRA beside the blocks.", ge=0, parameters="adds hybrid_r * (in + out) a layer"
    )
    alpha: int | float = setting(default=64, doc="Numerator of the scale alpha / (r + hybrid_r).")
    gralora_dropout: float = dropout_setting()
    gralora_k: int = setting(default=2, doc="Rows and columns of the grid; divides r, inputs and outputs.", gt=0)
    bias: str = bias_setting("gralora")
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise every factor is random.")

    def check_fields(self) -> None:
        if self.r % self.gralora_k:
            raise self.wrong("r", f"expected a multiple of gralora_k={self.gralora_k}, found {self.r}.")


@register_method
class GraLoRA(Method):
    """``alpha / (r + hybrid_r) * [B_jn A_jn]`` for blocks (j, n), plus a plain ``B A`` of rank hybrid_r.

    Blocks of a column share the matrix (in / k, r) that their A are parts of, blocks of a row that of their B.
    """

    config_class = GraloraConfig
    prefix = "gralora_"
    dropout_field = "gralora_dropout"
    numbers = ("r", "hybrid_r", "alpha", "gralora_k")
    patterned = ()
    config: GraloraConfig

    def options(self, site: Site) -> dict[str, Any]:
        return {**super().options(site), "scaling": self.config.alpha / (self.config.r + self.config.hybrid_r)}

    def refuse(self, site: Site) -> str | None:
        return undivided(site, "gralora_k", self.config.gralora_k)

    def slots(self, site: Site) -> dict[str, Slot]:
        config = self.config
        r, k, hybrid = config.r, config.gralora_k, config.hybrid_r
        inputs, outputs = site.fan_in // k, site.out // k
        sizes: dict[str, Any] = {"k": k, "i": inputs, "ranks": r, "o": outputs}
        start = Transposed(KaimingUniform(fan=inputs))
        slots = {
            "A": site.slot("gralora_A.*", "*experts k i ranks", start, **sizes),
            "B": site.slot("gralora_B.*", "*experts k ranks o", self.still_or(KaimingUniform(fan=r)), **sizes),
        }
        if hybrid:
            down, up = "gralora_A_general.*.weight", "gralora_B_general.*.weight"
            drawn, still = KaimingUniform(fan=site.fan_in), self.still_or(KaimingUniform(fan=hybrid))
            slots["down"] = site.slot(down, "*experts h fan_in", drawn, options={"leaf": "down"}, h=hybrid)
            slots["up"] = site.slot(up, "*experts out h", still, options={"leaf": "up"}, h=hybrid)
        return slots

    def delta(self, site: Site, p: P) -> Delta:
        blocks = BlockLowRank(p.A, p.B)
        return Dense(blocks.dense() + p.up @ p.down) if self.config.hybrid_r else blocks

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        y = inner.plus(x, p, BlockLowRank(p.A, p.B).scaled(p.scaling))
        if not self.config.hybrid_r:
            return y
        return (y + inner.apply(p.drop(x), LowRank(p.up, p.down).scaled(p.scaling))).to(y.dtype)
