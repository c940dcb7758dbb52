"""What PEFT's layers of BOFT, HRA, RoAd, HiRA, DEFT, BEFT and PEANuT have beside weights and numbers by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from inlay.compat.layers.lora import ConvMembers, LinearMembers
from inlay.compat.layers.mixins import refill
from inlay.core.layer import AdaptedLayer
from inlay.core.rotation import cayley

__all__ = ["MEMBERS"]


class BOFTMembers:
    """Of BOFT."""

    def reset_boft_parameters(self: Any, adapter_name: str, init_weights: bool) -> None:
        """Give an adapter fresh values: the identity, or small random rotations."""
        refill(self, adapter_name, init_weights=init_weights)

    def cayley_batch(self, data: Tensor) -> Tensor:
        """Return the rotations of the skew-symmetric parts of matrices, (n, b, b)."""
        turn = cayley(0.5 * (data - data.mT).float())
        return (turn + turn.new_ones(turn.shape[-1]).diag()).to(data.dtype)


class HRAMembers:
    """Of HRA."""

    def reset_hra_parameters(self: Any, adapter_name: str) -> None:
        """Give an adapter fresh values that change nothing, if that can be."""
        refill(self, adapter_name, init_weights=True)

    def reset_hra_parameters_random(self: Any, adapter_name: str) -> None:
        """Give an adapter fresh random values."""
        refill(self, adapter_name, init_weights=False)


class RoadMembers:
    """Of RoAd."""

    def reset_parameters(self: Any, adapter_name: str, init_weights: bool) -> None:
        """Give an adapter fresh values: no rotation, or random ones."""
        refill(self, adapter_name, init_weights=init_weights)


class HiraMembers:
    """Of HiRA."""

    def reset_hira_parameters(self: Any, adapter_name: str, init_weights: bool | str) -> None:
        """Give an adapter fresh values; with ``init_weights=False`` nothing happens, as in PEFT."""
        if init_weights is not False:
            refill(self, adapter_name, init_weights=init_weights)


class DeftMembers:
    """Of DEFT."""

    def reset_deft_parameters(self: Any, adapter_name: str, init_weights: bool = True) -> None:
        """Give an adapter fresh values; what is given starts as what is taken, or at random."""
        refill(self, adapter_name, init_weights=init_weights)
        for entry in self._each([adapter_name]) if isinstance(self, AdaptedLayer) and init_weights else ():
            entry.method.prepare(entry.site, self.params(entry), self.base_affine())


class BeftMembers:
    """Of BEFT."""

    def reset_beft_parameters(self: Any, adapter_name: str) -> None:
        """Set what an adapter adds to zero."""
        refill(self, adapter_name, init_weights=True)


class PeanutMembers:
    """Of PEANuT."""

    def reset_peanut_parameters(self: Any, adapter_name: str, init_weights: bool = True) -> None:
        """Give an adapter fresh values that change nothing, or random ones."""
        refill(self, adapter_name, init_weights=init_weights)


MEMBERS: dict[str, type[Any]] = {
    "tuners.boft.layer.BOFTLayer": BOFTMembers,
    "tuners.boft.layer.Linear": LinearMembers,
    "tuners.hra.layer.HRALayer": HRAMembers,
    "tuners.road.layer.RoadLayer": RoadMembers,
    "tuners.hira.layer.HiraLayer": HiraMembers,
    "tuners.hira.layer.Linear": LinearMembers,
    "tuners.hira.layer._ConvNd": ConvMembers,
    "tuners.deft.layer.DeftLayer": DeftMembers,
    "tuners.beft.layer.BeftLayer": BeftMembers,
    "tuners.peanut.layer.PeanutLayer": PeanutMembers,
}
