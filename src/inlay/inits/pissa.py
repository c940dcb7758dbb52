"""PiSSA: start from the principal singular directions of the weight (Meng et al. 2024, arXiv:2404.02948)."""

from __future__ import annotations

from inlay.inits.decompose import leading, projected
from inlay.inits.start import Factors, Given, Leading

__all__ = ["PiSSA"]


class PiSSA(Leading):
    """``scaling * B A`` is the best approximation of W of rank r, and the base is what is left of W.

    ``pissa_niter_k`` finds it by random projection with k rounds, which takes a fraction of the time.
    """

    def factors(self, given: Given) -> Factors:
        if self.name == "pissa":
            return given.scaled(*leading(given.weight, given.r))
        rounds = int(self.name.rpartition("_")[2])
        return given.scaled(*projected(given.weight, given.r, rounds, given.site.name))
