"""BEFT: train what is added to a layer's output (arXiv:2509.15974)."""

from __future__ import annotations

from torch import Tensor

from inlay.config import PeftConfig, PeftType, SavedModulesField, TargetField, setting, settings
from inlay.core.affine import Affine, Site
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot, zeros

__all__ = ["BEFT", "BeftConfig"]


@settings(positional="target_modules modules_to_save init_weights")
class BeftConfig(TargetField, SavedModulesField, PeftConfig):
    """Configuration of BEFT."""

    peft_type = PeftType.BEFT

    init_weights: bool = setting(default=True, doc="Start from zeros, which change nothing; otherwise from noise.")


@register_method
class BEFT(Method):
    """``W x + b + d``: d is trained. Without a bias b it runs, and no weight can hold it."""

    config_class = BeftConfig
    linear = ("bias",)
    prefix = "beft_"
    commutes = True
    config: BeftConfig

    def slots(self, site: Site) -> dict[str, Slot]:
        noise = Normal(1.0)
        start, before = (zeros, noise) if self.config.init_weights else (noise, None)
        return {"bias": site.slot("beft_bias.*", "1 out", start, options={"discarded": before})}

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        bias = p.bias.flatten()
        return Affine(layer.weight, bias if layer.bias is None else layer.bias + bias)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        y = inner(x)
        return (y + site.along_output(p.bias.flatten())).to(y.dtype)
