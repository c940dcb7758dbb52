"""Starts that need nothing but random numbers."""

from __future__ import annotations

from inlay.core.affine import Site
from inlay.core.slot import Init, KaimingUniform, Normal, zeros
from inlay.inits.start import Start

__all__ = ["Gaussian", "Random"]


class Gaussian(Start):
    """A normal with deviation 1/r, B zero, as diffusers starts LoRA."""

    def fills(self, site: Site, r: int) -> tuple[Init, Init]:
        return super().fills(site, r) if site.lookup else (Normal(1.0 / r), zeros)


class Random(Start):
    """Both factors random, so that a fresh adapter changes the output: for tests of what adapters do."""

    identity = False

    def fills(self, site: Site, r: int) -> tuple[Init, Init]:
        return (Normal(1.0), Normal(1.0)) if site.lookup else (KaimingUniform(), KaimingUniform())

    def discarded(self, site: Site) -> tuple[Init | None, Init | None]:
        return None, None
