"""(IA)^3: learned factors on outputs, or on the inputs of feed-forward layers (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from inlay.config import FanInFanOutField, PeftConfig, PeftType, TargetFields, check_pattern, setting, settings
from inlay.config.defaults import default_feedforward
from inlay.core.affine import Affine, Site
from inlay.core.method import Inner, Method, P
from inlay.core.patterns import matcher
from inlay.core.registry import register_method
from inlay.core.slot import Constant, Normal, Slot
from inlay.errors import TargetError

__all__ = ["IA3", "IA3Config"]


@settings(
    positional="target_modules exclude_modules feedforward_modules fan_in_fan_out modules_to_save init_ia3_weights"
)
class IA3Config(TargetFields, FanInFanOutField, PeftConfig):
    """Configuration of (IA)^3."""

    peft_type = PeftType.IA3

    feedforward_modules: list[str] | set[str] | str | None = setting(
        default=None,
        doc="Which of the target modules scale their input instead of their output: names or endings, or one regular "
        "expression; an empty list for none; without it, the model family's defaults.",
        parameters="those modules count their input features instead of their output features",
    )
    init_ia3_weights: bool = setting(
        default=True, doc="Start from factors of 1, which change nothing, instead of random ones."
    )

    def check_fields(self) -> None:
        feedforward = self.feedforward_modules
        if isinstance(feedforward, str):
            check_pattern(type(self).__name__, "feedforward_modules", feedforward)
        elif feedforward is not None:
            self.feedforward_modules = set(feedforward)
            if isinstance(self.target_modules, set) and not self.feedforward_modules <= self.target_modules:
                extra = sorted(self.feedforward_modules - self.target_modules)
                raise self.wrong("feedforward_modules", f"expected a part of target_modules, found {extra} beside.")


@register_method
class IA3(Method):
    """``diag(l) (W x + b)``, or in a feed-forward layer ``W diag(l) x + b``."""

    config_class = IA3Config
    prefix = "ia3_"
    config: IA3Config

    @property
    def identity(self) -> bool:
        return self.config.init_ia3_weights

    def implied(self, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        found = super().implied(model, model_type)
        if self.config.feedforward_modules is None:
            feedforward = default_feedforward(model_type) if model_type else None
            if feedforward is None:
                raise TargetError(
                    "feedforward_modules is not set and the model's family has no default; set it, to [] for none"
                )
            found["feedforward_modules"] = set(feedforward)
        return found

    def on_input(self, site: Site) -> bool:
        """Whether the factors act on the layer's input."""
        return matcher(self.config.feedforward_modules)(site.name) is not None

    def options(self, site: Site) -> dict[str, Any]:
        return {"on_input": self.on_input(site)}

    def refuse(self, site: Site) -> str | None:
        if site.elementwise and self.on_input(site):
            return "a norm takes back any factor on its input; leave it out of feedforward_modules"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        init = Constant(1.0) if self.config.init_ia3_weights else Normal(1.0)
        features = "all_in" if self.on_input(site) else "out"
        if site.kernel:
            dims = f"1 {features} *ones"
        else:
            dims = f"*experts 1 {features}" if self.on_input(site) else f"*experts {features} 1"
        return {"factors": site.slot("ia3_l.*", dims, init)}

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        if not p.on_input:
            rows = p.factors.reshape(*site.experts, site.out, 1)
            return Affine(layer.weight * rows, None if layer.bias is None else layer.bias * rows.flatten())
        # By group of outputs, channel and place in the kernel: each group reads channels of its own.
        split = layer.weight.reshape(*site.experts, site.groups, site.out // site.groups, site.channels, -1)
        columns = p.factors.reshape(*site.experts, site.groups, 1, site.channels, 1)
        return Affine((split * columns).reshape(layer.weight.shape), layer.bias)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        factors = p.factors.flatten()
        if not p.on_input:
            y = inner(x)
            return (y * site.along_output(factors)).to(y.dtype)
        if site.pooled:  # a bag has rows of several factors
            return super().forward(site, p, x, inner)
        if site.lookup:  # one-hot inputs: the factor of a row
            y = inner(x)
            return (y * factors[x].unsqueeze(-1)).to(y.dtype)
        return inner((x * site.along_output(factors)).to(x.dtype))
