"""FourierFT: an update that is sparse in the frequency domain (Gao et al. 2024, arXiv:2405.03003)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
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
from inlay.core.affine import Dense, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot, zeros
from inlay.errors import ConfigError

__all__ = ["FourierFT", "FourierFTConfig"]


@settings(
    positional="n_frequency scaling random_loc_seed fan_in_fan_out target_modules exclude_modules bias modules_to_save "
    "layers_to_transform layers_pattern n_frequency_pattern init_weights"
)
class FourierFTConfig(TargetFields, LayerFields, FanInFanOutField, FrequencyPatternField, PeftConfig):
    """Configuration of FourierFT."""

    peft_type = PeftType.FOURIERFT

    n_frequency: int = setting(
        default=1000, doc="Trained frequencies of each layer's update.", gt=0, parameters="that many a layer"
    )
    scaling: float = setting(default=150.0, doc="Scale of the update.")
    random_loc_seed: int | None = setting(default=777, doc="Seed that the frequencies are drawn from.")
    bias: str = bias_setting("fourier")
    init_weights: bool = setting(
        default=False, doc="Start from zeros, which change nothing, instead of a standard normal distribution."
    )

    def check_fields(self) -> None:
        if self.random_loc_seed is None:
            raise ConfigError(
                f"{type(self).__name__}.random_loc_seed: expected an integer, found None: the frequencies could not be "
                "drawn again for a saved adapter."
            )


@lru_cache(maxsize=16)
def drawn(size: int, count: int, seed: int) -> Tensor:
    """Return ``count`` of ``size`` places; PEFT draws the same ones."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()


@dataclass(frozen=True)
class Places:
    """Fill with the places of the trained frequencies, row by row."""

    size: int
    seed: int

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(drawn(self.size, tensor.numel(), self.seed))


@register_method
class FourierFT(Method):
    """``scaling * Re(ifft2(F))`` is added to W, F of W's shape with n trained entries at fixed random places."""

    config_class = FourierFTConfig
    linear = ("spectrum",)
    prefix = "fourierft_"
    config: FourierFTConfig

    def options(self, site: Site) -> dict[str, Any]:
        count = self.by_pattern("n_frequency_pattern", site, self.config.n_frequency)
        return {"fourierft_n_frequency": count, "scaling": self.config.scaling}

    def refuse(self, site: Site) -> str | None:
        count, size = self.options(site)["fourierft_n_frequency"], site.out * site.fan_in
        if count > size:
            return f"a weight of {site.out} x {site.fan_in} has {size} frequencies, found n_frequency={count}"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        n = self.options(site)["fourierft_n_frequency"]
        assert self.config.random_loc_seed is not None  # the config checks
        fixed = {"buffer": True, "saved": False, "trainable": False, "dtype": torch.int64}
        places = Places(site.out * site.fan_in, self.config.random_loc_seed)
        return {
            "spectrum": site.slot(
                "fourierft_spectrum.*", "*experts n", zeros if self.config.init_weights else Normal(1.0), n=n
            ),
            "places": site.slot("fourierft_places.*", "n", places, options=fixed, n=n),
        }

    def delta(self, site: Site, p: P) -> Dense:
        spectrum = p.spectrum if p.spectrum.dtype == torch.float64 else p.spectrum.float()  # fft knows no half
        flat = spectrum.new_zeros(*site.experts, site.out * site.fan_in).index_copy(-1, p.places, spectrum)
        update = torch.fft.ifft2(flat.reshape(*site.experts, site.out, site.fan_in)).real
        return Dense(update.to(p.spectrum.dtype))
