"""SHiRA: train a few entries of the weight, wherever they are (Bhardwaj et al. 2024, arXiv:2406.13175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.config import FanInFanOutField, PeftConfig, PeftType, SavedModulesField, TargetField, setting, settings
from inlay.core.affine import Affine, Site
from inlay.core.matrix_layer import matrix_layer
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Init, Normal, Slot, zeros
from inlay.core.structured import Sparse
from inlay.errors import ConfigError

__all__ = ["SHiRA", "ShiraConfig"]


@settings(positional="r mask_type random_seed target_modules fan_in_fan_out init_weights modules_to_save")
class ShiraConfig(TargetField, SavedModulesField, FanInFanOutField, PeftConfig):
    """Configuration of SHiRA.

    ``mask_fn`` may be set on a config: a function of a linear layer, which has the weight of the adapted one as a
    matrix (out, in), and of r, and for ``mask_type="random"`` of ``random_seed``. It returns a matrix of that shape
    with r * (in + out) ones, which are trained, and zeros. It is not saved: a checkpoint holds the places themselves.
    """

    peft_type = PeftType.SHIRA
    mask_fn = None

    r: int = setting(
        default=32,
        doc="As many numbers train as in a LoRA of this rank.",
        gt=0,
        parameters="r * (in + out) a layer",
    )
    mask_type: str = setting(
        default="random", doc="How entries are chosen: 'random', or any other name for a mask_fn of one's own."
    )
    random_seed: int | None = setting(
        default=None, doc="Seed of the random places; without it they are the same ones every time."
    )
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise from a normal distribution.")


@dataclass(frozen=True)
class Chosen:
    """Fill with the rows and columns of random entries, in the order of the matrix; PEFT draws the same ones."""

    rows: int
    columns: int
    seed: int | None

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        own = torch.Generator()  # PEFT leaves it as it comes where there is no seed
        if self.seed is not None:
            own.manual_seed(self.seed)
        places = torch.randperm(self.rows * self.columns, generator=own)[: tensor.shape[1]].sort().values
        tensor.copy_(torch.stack([places // self.columns, places % self.columns]))


@register_method
class SHiRA(Method):
    """``W + S`` where S has r * (in + out) trained entries at fixed places."""

    config_class = ShiraConfig
    linear = ("values",)
    prefix = "shira_"
    mixed = True
    patterned = ()
    config: ShiraConfig

    @property
    def needs_base(self) -> bool:
        return self.config.mask_type != "random" or self.config.mask_fn is not None

    def options(self, site: Site) -> dict[str, Any]:
        return {"r": self.config.r, "scaling": 1.0}

    def refuse(self, site: Site) -> str | None:
        count, size = self.config.r * (site.out + site.fan_in), site.out * site.fan_in
        if count > size:
            return f"r={self.config.r} asks for {count} of the {size} entries of a weight of {site.out} x {site.fan_in}"
        if self.config.mask_fn is not None and site.experts:
            return "mask_fn chooses entries of one matrix, and here is one for each expert"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        count = self.config.r * (site.out + site.fan_in)
        fixed = {"buffer": True, "trainable": False, "dtype": torch.int32}
        places: Init = zeros if self.needs_base else Chosen(site.out, site.fan_in, self.config.random_seed)
        start: Init = zeros if self.config.init_weights else Normal(1.0)
        return {
            "values": site.slot("shira_weight.*", "*experts n", start, n=count),
            "places": site.slot("shira_indices.*", "2 n", places, options=fixed, n=count),
        }

    def prepare(self, site: Site, p: P, layer: Affine) -> None:
        function, owner = self.config.mask_fn, type(self.config).__name__
        if function is None:
            raise ConfigError(
                f"{owner}.mask_type: expected 'random', or a function in mask_fn; found "
                f"{self.config.mask_type!r} and none."
            )
        seed = {"random_seed": self.config.random_seed} if self.config.mask_type == "random" else {}
        mask = function(matrix_layer(layer), self.config.r, **seed)
        if tuple(mask.shape) != (site.out, site.fan_in):
            raise ConfigError(
                f"{owner}.mask_fn: expected a mask of shape {(site.out, site.fan_in)} for {site.name!r}, found "
                f"{tuple(mask.shape)}."
            )
        places = (mask == 1).nonzero().t()
        if places.shape != p.places.shape or bool(((mask != 0) & (mask != 1)).any()):
            raise ConfigError(
                f"{owner}.mask_fn: expected a mask for {site.name!r} with r * (in + out) = {p.places.shape[1]} "
                f"ones, and zeros; found {places.shape[1]} ones and {int((mask == 0).sum())} zeros."
            )
        p.places.copy_(places)

    def delta(self, site: Site, p: P) -> Sparse:
        return Sparse(p.places[0], p.places[1], p.values, site.out, site.fan_in)
