"""SHiRA: train a few entries of the weight, wherever they are (Bhardwaj et al. 2024, arXiv:2406.13175)."""

from __future__ import annotations

from typing import Any

import torch

from inlay.config import FanInFanOutField, PeftConfig, PeftType, SavedModulesField, TargetField, setting, settings
from inlay.core.affine import Affine, Site
from inlay.core.matrix_layer import matrix_layer
from inlay.core.method import Method, P
from inlay.core.places import Entries
from inlay.core.registry import register_method
from inlay.core.slot import Init, Normal, Slot, zeros
from inlay.core.structured import Sparse

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
        places: Init = zeros if self.needs_base else Entries(site.out, site.fan_in, self.config.random_seed)
        return {
            "values": site.slot("shira_weight.*", "*experts n", self.still_or(Normal(1.0)), n=count),
            "places": site.constant("shira_indices.*", "2 n", places, saved=True, dtype=torch.int32, n=count),
        }

    def prepare(self, site: Site, p: P, layer: Affine) -> None:
        config, name = self.config, self.config.mask_type
        if config.mask_fn is None:
            raise config.wrong("mask_type", f"expected 'random', or a function in mask_fn; found {name!r} and none.")
        seed = {"random_seed": config.random_seed} if name == "random" else {}
        mask = config.mask_fn(matrix_layer(layer), config.r, **seed)
        shape, here = (site.out, site.fan_in), f"for {site.name!r}"
        if tuple(mask.shape) != shape:
            raise config.wrong("mask_fn", f"expected a mask of shape {shape} {here}, found {tuple(mask.shape)}.")
        places, n = (mask == 1).nonzero().t(), p.places.shape[1]
        if places.shape != p.places.shape or bool(((mask != 0) & (mask != 1)).any()):
            found = f"found {places.shape[1]} ones and {int((mask == 0).sum())} zeros"
            raise config.wrong("mask_fn", f"expected a mask {here} with r * (in + out) = {n} ones, and zeros; {found}.")
        p.places.copy_(places)

    def delta(self, site: Site, p: P) -> Sparse:
        return Sparse(p.places[0], p.places[1], p.values, site.out, site.fan_in)
