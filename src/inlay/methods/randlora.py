"""RandLoRA: full-rank updates from frozen random bases with trained diagonals (Albert et al. 2025, 2502.00987)."""

from __future__ import annotations

import math
from typing import Any

from inlay.config import PeftConfig, PeftType, ProjectionFields, bias_setting, dropout_setting, setting, settings
from inlay.core.affine import LowRank, Site
from inlay.core.method import Method, P
from inlay.core.random_bases import Basis
from inlay.core.registry import register_method
from inlay.core.slot import Constant, Normal, Slot, zeros

__all__ = ["RandLoRA", "RandLoraConfig"]


@settings(
    positional="r target_modules projection_prng_key save_projection sparse very_sparse randlora_dropout "
    "fan_in_fan_out randlora_alpha bias modules_to_save init_weights layers_to_transform layers_pattern"
)
class RandLoraConfig(ProjectionFields, PeftConfig):
    """Configuration of RandLoRA."""

    peft_type = PeftType.RANDLORA

    r: int = setting(
        default=32,
        doc="Rank of one basis; a layer has as many bases as make its rank full.",
        gt=0,
        parameters="about min(in, out) * (1 + min(in, out) / r) a layer",
    )
    sparse: bool = setting(default=False, doc="Bases of -1, 0 and 1, a third of them not zero.")
    very_sparse: bool = setting(
        default=False, doc="Bases of -1, 0 and 1, one in sqrt(min(in, out)) of them not zero; goes before sparse."
    )
    randlora_dropout: float = dropout_setting()
    randlora_alpha: int = setting(default=640, doc="Numerator of the scale alpha / r.")
    bias: str = bias_setting("randlora")
    init_weights: bool = setting(
        default=True, doc="Start from no change; otherwise the factors of the bases are random."
    )


@register_method
class RandLoRA(Method):
    """``alpha / r * sum_i B_i diag(l_i) A diag(g_i)`` is added to W, or its transpose where W is wider than high.

    A (r, n) and B_i (m, r) are frozen, drawn once for all layers and cut to a layer's ``m >= n``; l starts at zero.
    """

    config_class = RandLoraConfig
    prefix = "randlora_"
    dropout_field = "randlora_dropout"
    config: RandLoraConfig

    def options(self, site: Site) -> dict[str, Any]:
        return {"r": self.config.r, "scaling": self.config.randlora_alpha / self.config.r}

    def bases(self, small: int) -> int:
        """Return how many bases make a rank of ``small``."""
        return math.ceil(small / self.config.r)

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        if not sites:
            return {}
        config = self.config
        small, large = sorted((max(site.out for site in sites), max(site.fan_in for site in sites)))
        sparsity = math.sqrt(small) if config.very_sparse else 3.0 if config.sparse else None
        fixed: dict[str, Any] = {"buffer": True, "trainable": False, "saved": config.save_projection}
        A, B = (config.r, 1, small), (large, self.bases(small), config.r)
        key = config.projection_prng_key
        return {
            "A": Slot("randlora_A.*", A, ("r", "one", "small"), Basis(key, sparsity), **fixed),
            "B": Slot("randlora_B.*", B, ("large", "bases", "r"), Basis(key, sparsity, after=A), **fixed),
        }

    def slots(self, site: Site) -> dict[str, Slot]:
        small, large = sorted((site.out, site.fan_in))
        sizes: dict[str, Any] = {"r": self.config.r, "bases": self.bases(small), "small": small}
        start = self.config.init_weights
        even = Constant(1 / max(sizes["bases"], small) if start else 1 / large)
        return {
            "inner": site.slot(
                "randlora_lambda.*",
                "*experts r bases",
                zeros if start else Normal(1.0),
                options={"discarded": Normal(1.0)} if start else None,
                **sizes,
            ),
            "outer": site.slot("randlora_gamma.*", "*experts bases small", even, **sizes),
        }

    def delta(self, site: Site, p: P) -> LowRank:
        small, large = sorted((site.out, site.fan_in))
        narrow = (p.inner.unsqueeze(-1) * p.A[..., :small] * p.outer.unsqueeze(-3)).flatten(-3, -2)
        wide = p.B[:large, : p.outer.shape[-2]].flatten(1)  # pairs rank and basis in another order, as PEFT does
        wide = wide.expand(*site.experts, *wide.shape)
        return LowRank(wide, narrow) if small == site.fan_in else LowRank(narrow.mT, wide.mT)
