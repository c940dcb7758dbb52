"""GraLoRA: a grid of blocks, each of low rank (Jung et al. 2025, arXiv:2505.20355)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
from inlay.core.affine import Delta, Dense, LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Init, KaimingUniform, Slot, zeros
from inlay.core.structured import BlockLowRank
from inlay.errors import ConfigError

if TYPE_CHECKING:
    from inlay.core.inner import Inner

__all__ = ["GraLoRA", "GraloraConfig"]


@settings(
    positional="r hybrid_r target_modules alpha gralora_dropout gralora_k fan_in_fan_out bias modules_to_save "
    "init_weights layers_to_transform layers_pattern"
)
class GraloraConfig(TargetField, SavedModulesField, LayerFields, FanInFanOutField, PeftConfig):
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
    gralora_dropout: float = setting(
        default=0.0, doc="Probability of dropping an input element of the update.", ge=0.0, lt=1.0
    )
    gralora_k: int = setting(default=2, doc="Rows and columns of the grid; divides r, inputs and outputs.", gt=0)
    bias: str = bias_setting("gralora")
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise every factor is random.")

    def check_fields(self) -> None:
        if self.r % self.gralora_k:
            raise ConfigError(
                f"{type(self).__name__}.r: expected a multiple of gralora_k={self.gralora_k}, found {self.r}."
            )


@dataclass(frozen=True)
class Turned:
    """Draw the transposed matrices."""

    init: KaimingUniform

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        drawn = tensor.new_empty(tensor.mT.shape)
        self.init(drawn, generator)
        tensor.copy_(drawn.mT)


@register_method
class GraLoRA(Method):
    """``alpha / (r + hybrid_r) * [B_jn A_jn]`` for blocks (j, n), plus a plain ``B A`` of rank hybrid_r.

    Blocks of a column share the matrix (in / k, r) that their A are parts of, blocks of a row that of their B.
    """

    config_class = GraloraConfig
    prefix = "gralora_"
    dropout_field = "gralora_dropout"
    patterned = ()
    config: GraloraConfig

    def options(self, site: Site) -> dict[str, Any]:
        config = self.config
        numbers = {name: getattr(config, name) for name in ("r", "hybrid_r", "alpha", "gralora_k")}
        return {**numbers, "scaling": config.alpha / (config.r + config.hybrid_r)}

    def refuse(self, site: Site) -> str | None:
        k = self.config.gralora_k
        if site.fan_in % k or site.out % k:
            return f"gralora_k={k} does not divide a weight of {site.out} x {site.fan_in}"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        config = self.config
        r, k, hybrid = config.r, config.gralora_k, config.hybrid_r
        inputs, outputs = site.fan_in // k, site.out // k

        def outer(fan: int) -> Init:
            return zeros if config.init_weights else KaimingUniform(fan=fan)

        slots = {
            "A": site.slot(
                "gralora_A.*", "*experts k i ranks", Turned(KaimingUniform(fan=inputs)), k=k, i=inputs, ranks=r
            ),
            "B": site.slot("gralora_B.*", "*experts k ranks o", outer(r), k=k, ranks=r, o=outputs),
        }
        if hybrid:
            down, up = "gralora_A_general.*.weight", "gralora_B_general.*.weight"
            start = KaimingUniform(fan=site.fan_in)
            slots["down"] = site.slot(down, "*experts h fan_in", start, options={"leaf": "down"}, h=hybrid)
            slots["up"] = site.slot(up, "*experts out h", outer(hybrid), options={"leaf": "up"}, h=hybrid)
        return slots

    def delta(self, site: Site, p: P) -> Delta:
        blocks = BlockLowRank(p.A, p.B)
        return Dense(blocks.dense() + p.up @ p.down) if self.config.hybrid_r else blocks

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        y = inner.plus(x, p, BlockLowRank(p.A, p.B).scaled(p.scaling))
        if not self.config.hybrid_r:
            return y
        return (y + inner.apply(p.drop(x), LowRank(p.up, p.down).scaled(p.scaling))).to(y.dtype)
