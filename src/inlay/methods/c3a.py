"""C3A: an update of circulant blocks, which convolve around a circle (Chen et al. 2024, arXiv:2407.19342)."""

from __future__ import annotations

import math
from typing import Literal

from inlay.config import BlockTargetField, PeftConfig, PeftType, bias_setting, check_pattern_keys, setting, settings
from inlay.core.affine import Site
from inlay.core.divisors import undivided
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Init, Normal, Slot, Uniform, zeros
from inlay.core.structured import Circulant

__all__ = ["C3A", "C3AConfig"]


@settings(
    positional="block_size target_modules bias modules_to_save layers_to_transform layers_pattern block_size_pattern "
    "init_weights"
)
class C3AConfig(BlockTargetField, PeftConfig):
    """Configuration of C3A."""

    peft_type = PeftType.C3A

    block_size: int = setting(
        default=256,
        doc="Rows and columns of a block; divides the inputs and the outputs of every adapted layer.",
        gt=0,
        parameters="in * out / block_size a layer",
    )
    bias: str = bias_setting("c3a")
    block_size_pattern: dict[str, int] | None = setting(
        doc="Sizes that differ from block_size: module name, ending or regular expression -> size.",
        factory=dict,
        gt=0,
        parameters="those modules count with their own size",
    )
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = setting(
        default="xavier_uniform",
        doc="Distribution that the update starts from (False: 'xavier_uniform'); True starts from no change.",
    )

    def check_fields(self) -> None:
        check_pattern_keys(self, "block_size_pattern")


@register_method
class C3A(Method):
    """``1 / in * [C(w_mn)]``: block (m, n) has the vector w_mn as its first row, turned by one place in each next."""

    config_class = C3AConfig
    linear = ("kernel",)
    prefix = "c3a_"
    numbers = ("block_size",)
    patterned = ("block_size_pattern",)
    config: C3AConfig

    @property
    def identity(self) -> bool:
        return self.config.init_weights is True

    def refuse(self, site: Site) -> str | None:
        return undivided(site, "block_size", self.number("block_size", site))

    def start(self, site: Site) -> Init:
        """Return what fills the kernels."""
        name = self.config.init_weights
        if name is True:
            return zeros
        if name == "gaussian":
            return Normal(1.0)
        if name == "kaiming_uniform":
            return Uniform(1 / math.sqrt(site.fan_in))
        return Uniform(math.sqrt(6 / (site.fan_in + site.out)))

    def slots(self, site: Site) -> dict[str, Slot]:
        b = self.number("block_size", site)
        sizes = {"m": site.out // b, "n": site.fan_in // b, "b": b}
        return {"kernel": site.slot("c3a_kernel.*", "*experts m n b", self.start(site), **sizes)}

    def delta(self, site: Site, p: P) -> Circulant:
        return Circulant(p.kernel / site.fan_in)
