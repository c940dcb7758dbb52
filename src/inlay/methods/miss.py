"""MiSS: one small matrix shared by all blocks of a weight (Kang et al. 2024, arXiv:2409.15371)."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from inlay.config import BlockTargetFields, PeftConfig, PeftType, bias_setting, dropout_setting, setting, settings
from inlay.core.affine import Site
from inlay.core.divisors import undivided
from inlay.core.method import Method, P
from inlay.core.reading import ReadsBelow
from inlay.core.registry import register_method
from inlay.core.slot import KaimingUniform, Slot
from inlay.core.structured import Repeated

__all__ = ["MiSS", "MissBat", "MissConfig"]


@settings(
    positional="r miss_dropout mini_r target_modules exclude_modules init_weights layers_to_transform layers_pattern "
    "bias modules_to_save"
)
class MissConfig(BlockTargetFields, PeftConfig):
    """Configuration of MiSS."""

    peft_type = PeftType.MISS

    r: int = setting(
        default=64,
        doc="Columns of the small matrix; inputs r apart are treated alike.",
        gt=0,
        parameters="r * out a layer; r * mini_r for 'mini'",
    )
    miss_dropout: float = dropout_setting()
    mini_r: int = setting(
        default=1, doc="Rows of the small matrix for 'mini'; outputs mini_r apart are treated alike.", gt=0
    )
    init_weights: bool | Literal["bat", "mini"] = setting(
        default=True,
        doc="Which form the update has: the usual one (True; False starts it at random), 'mini' with fewer rows, or "
        "'bat', whose blocks also multiply the weight.",
    )
    bias: str = bias_setting("MiSS")


@register_method
class MiSS(Method):
    """``W + [D D ...]``: D, (out, r), stands beside itself over all inputs; for 'mini' also below itself."""

    config_class = MissConfig
    linear = ("block",)
    prefix = "miss_"
    dropout_field = "miss_dropout"
    patterned = ()
    config: MissConfig

    @classmethod
    def variant(cls, config: Any) -> type[Method]:
        return MissBat if config.init_weights == "bat" else cls

    def options(self, site: Site) -> dict[str, Any]:
        return {"miss_r": self.config.r, "miss_mini_r": self.config.mini_r}

    def refuse(self, site: Site) -> str | None:
        r, mini_r = self.config.r, self.config.mini_r
        if r > site.fan_in:
            return f"r={r} is more than the {site.fan_in} columns of its weight"
        if self.config.init_weights == "mini" and site.out % mini_r:
            return f"mini_r={mini_r} does not divide its {site.out} rows"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        start = self.still_or(KaimingUniform(fan=site.out))
        rows = "rows" if self.config.init_weights == "mini" else "out"
        dims = f"*experts k {rows}"
        return {"block": site.slot("miss_block.*", dims, start, k=self.config.r, rows=self.config.mini_r)}

    def delta(self, site: Site, p: P) -> Repeated:
        return Repeated(p.block.mT, site.out, site.fan_in)


class MissBat(ReadsBelow, MiSS):
    """``W_ij + W_ij B_i + B_i`` for every block (r, r) of the weight; B_i is shared by a row of blocks."""

    def refuse(self, site: Site) -> str | None:
        return undivided(site, "r", self.config.r)

    def slots(self, site: Site) -> dict[str, Slot]:
        k = self.config.r
        return {"block": site.slot("miss_block.*", "*experts rows k k", k=k, rows=site.out // k)}

    def change(self, site: Site, p: P, weight: Tensor) -> Tensor:
        k, B = self.config.r, p.block.unsqueeze(-3)
        blocks = weight.to(B.dtype).unflatten(-1, (-1, k)).unflatten(-3, (-1, k)).transpose(-3, -2)
        return (blocks @ B + B).transpose(-3, -2).flatten(-4, -3).flatten(-2)
