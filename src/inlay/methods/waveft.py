"""WaveFT: an update that is sparse among its wavelet coefficients (Bilican et al. 2025, arXiv:2505.12532)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from inlay.config import FrequencyFields, PeftConfig, PeftType, bias_setting, setting, settings
from inlay.core.affine import Delta, Site
from inlay.core.fills import Given
from inlay.core.method import Method, P
from inlay.core.places import too_many
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot
from inlay.core.structured import Sandwich, Sparse
from inlay.core.wavelet_places import Coefficients
from inlay.core.wavelets import Synthesiser, filters, no_wavelet, padded

__all__ = ["WaveFT", "WaveFTConfig"]


@settings(
    positional="n_frequency scaling wavelet_family use_idwt random_loc_seed fan_in_fan_out target_modules "
    "exclude_modules bias modules_to_save layers_to_transform layers_pattern n_frequency_pattern "
    "proportional_parameters init_weights"
)
class WaveFTConfig(FrequencyFields, PeftConfig):
    """Configuration of WaveFT."""

    peft_type = PeftType.WAVEFT

    n_frequency = 2592
    scaling = 25.0
    wavelet_family: str = setting(default="db1", doc="The wavelet; longer ones take longer.", check=no_wavelet)
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
        count = self.shares.get(site.patterns or site.name, self.number("n_frequency", site))
        return {"waveft_n_frequency": count, "scaling": self.config.scaling}

    def refuse(self, site: Site) -> str | None:
        return too_many(site, "n_frequency", self.options(site)["waveft_n_frequency"])

    def slots(self, site: Site) -> dict[str, Slot]:
        config, n = self.config, self.options(site)["waveft_n_frequency"]
        bank = filters(config.wavelet_family)
        length = len(bank[0])
        rows, columns = (padded(size, length) if config.use_idwt else size for size in (site.out, site.fan_in))
        places = Coefficients(site.out, site.fan_in, rows, columns, config.random_loc_seed, config.use_idwt)
        slots = {
            "spectrum": site.slot("waveft_spectrum.*", "*experts n", self.still_or(Normal(0.01)), n=n),
            "places": site.constant("waveft_places.*", "2 n", places, dtype=torch.int64, n=n),
        }
        if config.use_idwt:
            slots["bank"] = site.constant("waveft_filters.*", "2 length", Given(bank), length=length)
        return slots

    def delta(self, site: Site, p: P) -> Delta:
        row, column = p.places
        if not self.config.use_idwt:
            return Sparse(row, column, p.spectrum, site.out, site.fan_in)
        out, inputs = (Synthesiser(p.bank, size) for size in (site.out, site.fan_in))
        return Sandwich(Sparse(row, column, p.spectrum, out.size, inputs.size), out, inputs)
