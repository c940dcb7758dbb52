"""WaveFT: an update that is sparse among its wavelet coefficients (Bilican et al. 2025, arXiv:2505.12532)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.config import (
    FanInFanOutField,
    FrequencyPatternField,
    LayerFields,
    PeftConfig,
    PeftType,
    TargetFields,
    bias_setting,
    setting,
    settings,
)
from inlay.core.affine import Delta, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot, zeros
from inlay.core.structured import Sandwich, Sparse
from inlay.core.wavelets import Synthesiser, filters, padded, wavelets
from inlay.errors import did_you_mean
from inlay.methods.fourierft import drawn

__all__ = ["WaveFT", "WaveFTConfig"]


def _known(name: str) -> str | None:
    if name in wavelets():
        return None
    return f"an orthogonal wavelet (db1 to db10, sym2 to sym10, coif1 to coif5){did_you_mean(name, wavelets())}"


@settings(
    positional="n_frequency scaling wavelet_family use_idwt random_loc_seed fan_in_fan_out target_modules "
    "exclude_modules bias modules_to_save layers_to_transform layers_pattern n_frequency_pattern "
    "proportional_parameters init_weights"
)
class WaveFTConfig(TargetFields, LayerFields, FanInFanOutField, FrequencyPatternField, PeftConfig):
    """Configuration of WaveFT."""

    peft_type = PeftType.WAVEFT

    n_frequency: int = setting(
        default=2592, doc="Trained coefficients of each layer's update.", gt=0, parameters="that many a layer"
    )
    scaling: float = setting(default=25.0, doc="Scale of the update.")
    wavelet_family: str = setting(default="db1", doc="The wavelet; longer ones take longer.", check=_known)
    use_idwt: bool = setting(
        default=True,
        doc="Make the update from its coefficients; otherwise train its entries themselves, which is faster.",
    )
    random_loc_seed: int = setting(default=777, doc="Seed that the places of the coefficients are drawn from.")
    bias: str = bias_setting("waveft")
    proportional_parameters: bool = setting(
        default=False,
        doc="Share the coefficients out among the layers by the size of their weights, n_frequency on average.",
        parameters="the same in sum",
    )
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise from small random coefficients.")


@dataclass(frozen=True)
class Coefficients:
    """Fill with rows and columns of the trained coefficients, low-pass ones first along both axes.

    Attributes:
        out, fan_in: shape of the update; PEFT draws as many places, and moves them to the middle of
        rows, columns: how many coefficients there are.
        seed: what they are drawn from.
        crossed: the quadrants with one high-pass axis change places.
    """

    out: int
    fan_in: int
    rows: int
    columns: int
    seed: int
    crossed: bool

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        places = drawn(self.out * self.fan_in, tensor.shape[1], self.seed)
        row = places // self.fan_in + (self.rows - self.out) // 2
        column = places % self.fan_in + (self.columns - self.fan_in) // 2
        if self.crossed:  # the quadrant above right is high-pass along the rows in PEFT, the one below left is not
            mixed = (row < self.rows // 2) != (column < self.columns // 2)
            row = torch.where(mixed, (row + self.rows // 2) % self.rows, row)
            column = torch.where(mixed, (column + self.columns // 2) % self.columns, column)
        tensor.copy_(torch.stack([row, column]))


@register_method
class WaveFT(Method):
    """``scaling * S C S^T`` is added to W: C has n trained wavelet coefficients at random places, S synthesises."""

    config_class = WaveFTConfig
    linear = ("spectrum",)
    prefix = "waveft_"
    config: WaveFTConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.shares: dict[str, int] = {}

    def survey(self, sites: Sequence[Site]) -> None:
        if not self.config.proportional_parameters:
            return
        sizes = {site.patterns or site.name: site.out * site.fan_in for site in sites}
        budget = self.config.n_frequency * len(sites) / sum(sizes.values())
        self.shares = {name: max(1, round(size * budget)) for name, size in sizes.items()}

    def options(self, site: Site) -> dict[str, Any]:
        own = self.by_pattern("n_frequency_pattern", site, self.config.n_frequency)
        count = self.shares.get(site.patterns or site.name, own)
        return {"waveft_n_frequency": count, "scaling": self.config.scaling}

    def refuse(self, site: Site) -> str | None:
        count, size = self.options(site)["waveft_n_frequency"], site.out * site.fan_in
        if count > size:
            return f"a weight of {site.out} x {site.fan_in} has {size} coefficients to train, found n_frequency={count}"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        config, n = self.config, self.options(site)["waveft_n_frequency"]
        fixed: dict[str, Any] = {"buffer": True, "saved": False, "trainable": False}
        bank = Bank(config.wavelet_family)
        rows, columns = (padded(size, bank.length) if config.use_idwt else size for size in (site.out, site.fan_in))
        places = Coefficients(site.out, site.fan_in, rows, columns, config.random_loc_seed, config.use_idwt)
        start = zeros if config.init_weights else Normal(0.01)
        slots = {
            "spectrum": site.slot("waveft_spectrum.*", "*experts n", start, n=n),
            "places": site.slot("waveft_places.*", "2 n", places, options={**fixed, "dtype": torch.int64}, n=n),
        }
        if config.use_idwt:
            slots["bank"] = site.slot("waveft_filters.*", "2 length", bank, options=fixed, length=bank.length)
        return slots

    def delta(self, site: Site, p: P) -> Delta:
        row, column = p.places
        if not self.config.use_idwt:
            return Sparse(row, column, p.spectrum, site.out, site.fan_in)
        out, inputs = (Synthesiser(p.bank, size) for size in (site.out, site.fan_in))
        return Sandwich(Sparse(row, column, p.spectrum, out.size, inputs.size), out, inputs)


@dataclass(frozen=True)
class Bank:
    """Fill with the low-pass and the high-pass filter of a wavelet."""

    name: str

    @property
    def length(self) -> int:
        """Numbers in each filter."""
        return len(filters(self.name)[0])

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.tensor(filters(self.name), dtype=tensor.dtype))
