"""VeRA: one frozen random pair A, B for all layers, two trained vectors for each (Kopiczko et al. 2023, 2310.11454)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

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
from inlay.core.affine import LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Constant, Normal, Slot, zeros
from inlay.errors import InlayWarning

__all__ = ["VeRA", "VeraConfig"]


@settings(
    positional="r target_modules projection_prng_key save_projection vera_dropout d_initial fan_in_fan_out bias "
    "modules_to_save init_weights layers_to_transform layers_pattern"
)
class VeraConfig(TargetField, SavedModulesField, LayerFields, FanInFanOutField, PeftConfig):
    """Configuration of VeRA."""

    peft_type = PeftType.VERA

    r: int = setting(default=256, doc="Rank of the shared projections.", gt=0, parameters="r + out a layer")
    projection_prng_key: int = setting(default=0, doc="Seed that the shared projections are drawn from.")
    save_projection: bool = setting(
        default=True, doc="Keep the shared projections in the checkpoint; otherwise they are drawn again from the seed."
    )
    vera_dropout: float = setting(
        default=0.0, doc="Probability of dropping an input element of the update.", ge=0.0, lt=1.0
    )
    d_initial: float = setting(default=0.1, doc="What the factors inside the update start from.")
    bias: str = bias_setting("vera")
    init_weights: bool = setting(
        default=True, doc="Start from no change; otherwise the outer factors are 1, the inner random."
    )

    def check_fields(self) -> None:
        if not self.save_projection:
            warnings.warn(
                f"{type(self).__name__}.save_projection is False: the projections are drawn again from "
                "projection_prng_key on loading, which other versions of torch may do differently.",
                InlayWarning,
                stacklevel=5,
            )


@dataclass(frozen=True)
class Projection:
    """Fill with the projection that a key gives, as PEFT draws it: A first, then B from the same stream.

    Attributes:
        skip: shape of the projection that is drawn before, and thrown away.
    """

    key: int
    skip: tuple[int, int] | None = None

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        stream = torch.Generator().manual_seed(self.key)
        if self.skip is not None:
            torch.empty(self.skip).uniform_(generator=stream)
        bound = math.sqrt(6.0 / tensor.shape[1])  # Kaiming (2015) with the gain of a ReLU
        tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=stream))


@register_method
class VeRA(Method):
    """``diag(b) B diag(d) A`` is added to W: A and B are the corner that fits the layer; b starts at zero."""

    config_class = VeraConfig
    prefix = "vera_lambda_"
    dropout_field = "vera_dropout"
    config: VeraConfig

    @property
    def identity(self) -> bool:
        return self.config.init_weights

    def options(self, site: Site) -> dict[str, Any]:
        return {"r": self.config.r}

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        if not sites:
            return {}
        r, key = self.config.r, self.config.projection_prng_key
        fixed: dict[str, Any] = {"buffer": True, "trainable": False, "saved": self.config.save_projection}
        down, up = (r, max(site.fan_in for site in sites)), (max(site.out for site in sites), r)
        return {
            "A": Slot("vera_A.*", down, ("r", "fan_in"), Projection(key), **fixed),
            "B": Slot("vera_B.*", up, ("out", "r"), Projection(key, skip=down), **fixed),
        }

    def slots(self, site: Site) -> dict[str, Slot]:
        start = self.config.init_weights
        outer, inner = (zeros, Constant(self.config.d_initial)) if start else (Constant(1.0), Normal(1.0))
        return {
            "b": site.slot("vera_lambda_b.*", "*experts out", outer),
            "d": site.slot("vera_lambda_d.*", "*experts r", inner, r=self.config.r),
        }

    def delta(self, site: Site, p: P) -> LowRank:
        A, B = p.A[:, : site.fan_in], p.B[: site.out]
        return LowRank(p.b.unsqueeze(-1) * B, p.d.unsqueeze(-1) * A)
