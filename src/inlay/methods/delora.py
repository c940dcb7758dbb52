"""DeLoRA: a sum of rank-one updates of bounded strength (Bini et al. 2025, arXiv:2503.18225)."""

from __future__ import annotations

from inlay.config import (
    BlockTargetFields,
    PeftConfig,
    PeftType,
    RankPatternField,
    bias_setting,
    check_pattern_keys,
    dropout_setting,
    setting,
    settings,
)
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Constant, KaimingUniform, Slot

__all__ = ["DeLoRA", "DeloraConfig"]

_SHORTEST = 1e-4  # a vector that is shorter counts as this long


@settings(
    positional="r delora_lambda module_dropout target_modules exclude_modules bias init_weights layers_to_transform "
    "layers_pattern rank_pattern lambda_pattern modules_to_save"
)
class DeloraConfig(BlockTargetFields, RankPatternField, PeftConfig):
    """Configuration of DeLoRA."""

    peft_type = PeftType.DELORA

    r: int = setting(default=8, doc="Number of rank-one updates.", gt=0, parameters="r * (in + out) + 1 a linear layer")
    delora_lambda: int | float = setting(
        default=15, doc="Where the trained bound on the strength starts, relative to the columns of the weight."
    )
    module_dropout: float = dropout_setting()
    bias: str = bias_setting("delora")
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise both factors are random.")
    lambda_pattern: dict[str, float] | None = setting(
        doc="Bounds that differ from delora_lambda: module name, ending or regular expression -> number.", factory=dict
    )

    def check_fields(self) -> None:
        check_pattern_keys(self, "lambda_pattern")


@register_method
class DeLoRA(Method):
    """``lambda / r * sum_i (b_i a_i^T) / (|b_i| |a_i|) * diag(n)``: n are norms of the untouched weight's columns."""

    config_class = DeloraConfig
    prefix = "delora_"
    dropout_field = "module_dropout"
    skip_probability = 0.0  # module_dropout drops input elements here
    numbers = ("r",)
    patterned = ("rank_pattern", "lambda_pattern")
    config: DeloraConfig

    def refuse(self, site: Site) -> str | None:
        if site.fan_in == 1:
            return "DeLoRA trains the directions of rows, and a row that is a single number has none"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        r = self.number("r", site)
        bound = float(self.by_pattern("lambda_pattern", site, self.config.delora_lambda))
        up = self.still_or(KaimingUniform(fan=r))
        return {
            "A": site.slot("delora_A.*", "*experts r fan_in", KaimingUniform(fan=site.fan_in), r=r),
            "B": site.slot("delora_B.*", "*experts out r", up, r=r),
            "bound": site.slot("delora_lambda.*", "1", Constant(bound)),
            "norms": site.constant("delora_w_norm.*", "*experts fan_in", Constant(1.0), saved=True),
        }

    def prepare(self, site: Site, p: P, layer: Affine) -> None:
        p.norms.copy_(layer.weight.norm(dim=-2))

    def delta(self, site: Site, p: P) -> LowRank:
        # each by its own length: the product of two short ones is more than float16 can divide by
        A = p.A / p.A.norm(dim=-1, keepdim=True).clamp_min(_SHORTEST)
        B = p.B / p.B.norm(dim=-2, keepdim=True).clamp_min(_SHORTEST)
        return LowRank(B * (p.bound / p.r), A * p.norms.unsqueeze(-2))
