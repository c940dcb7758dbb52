"""EVA: A starts at the principal directions of the layer's inputs (Paischer et al. 2024, arXiv:2410.07170)."""

from __future__ import annotations

from inlay.core.affine import Site
from inlay.core.slot import Init
from inlay.inits.start import Drawn, Start

__all__ = ["Eva"]


class Eva(Start):
    """The ordinary start until ``initialize_lora_eva_weights`` has seen data; B stays zero, and so does the update."""

    def fills(self, site: Site, r: int) -> tuple[Init, Init]:
        A, B = super().fills(site, r)
        return (A, B) if site.lookup else (A, Drawn(A))

    def discarded(self, site: Site) -> tuple[Init | None, Init | None]:
        return super().discarded(site) if site.lookup else (None, None)
