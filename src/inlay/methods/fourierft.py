"""FourierFT: an update that is sparse in the frequency domain (Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

from typing import Any

import torch

from inlay.config import FrequencyFields, PeftConfig, PeftType, bias_setting, setting, settings
from inlay.core.affine import Dense, Site
from inlay.core.dtype import merge_dtype
from inlay.core.method import Method, P
from inlay.core.places import Places, too_many
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot

__all__ = ["FourierFT", "FourierFTConfig"]


@settings(
    positional="n_frequency scaling random_loc_seed fan_in_fan_out target_modules exclude_modules bias modules_to_save "
    "layers_to_transform layers_pattern n_frequency_pattern init_weights"
)
class FourierFTConfig(FrequencyFields, PeftConfig):
    """Configuration of FourierFT."""

    peft_type = PeftType.FOURIERFT

    scaling = 150.0
    random_loc_seed: int | None = setting(default=777, doc="Seed that the frequencies are drawn from.")
    bias: str = bias_setting("fourier")
    init_weights: bool = setting(
        default=False, doc="Start from zeros, which change nothing, instead of a standard normal distribution."
    )

    def check_fields(self) -> None:
        if self.random_loc_seed is None:
            because = "the frequencies could not be drawn again for a saved adapter"
            raise self.wrong("random_loc_seed", f"expected an integer, found None: {because}.")


@register_method
class FourierFT(Method):
    """``scaling * Re(ifft2(F))`` is added to W, F of W's shape with n trained entries at fixed random places."""

    config_class = FourierFTConfig
    linear = ("spectrum",)
    prefix = "fourierft_"
    config: FourierFTConfig

    def options(self, site: Site) -> dict[str, Any]:
        return {"fourierft_n_frequency": self.number("n_frequency", site), "scaling": self.config.scaling}

    def refuse(self, site: Site) -> str | None:
        return too_many(site, "n_frequency", self.number("n_frequency", site))

    def slots(self, site: Site) -> dict[str, Slot]:
        n = self.number("n_frequency", site)
        assert self.config.random_loc_seed is not None  # the config checks
        places = Places(site.out * site.fan_in, self.config.random_loc_seed)
        start = self.still_or(Normal(1.0))
        return {
            "spectrum": site.slot("fourierft_spectrum.*", "*experts n", start, n=n),
            "places": site.constant("fourierft_places.*", "n", places, dtype=torch.int64, n=n),
        }

    def delta(self, site: Site, p: P) -> Dense:
        spectrum = p.spectrum.to(merge_dtype(p.spectrum.dtype))  # fft knows no half
        flat = spectrum.new_zeros(*site.experts, site.out * site.fan_in).index_copy(-1, p.places, spectrum)
        update = torch.fft.ifft2(flat.reshape(*site.experts, site.out, site.fan_in)).real
        return Dense(update.to(p.spectrum.dtype))
