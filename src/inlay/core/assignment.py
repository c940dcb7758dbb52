"""Which element of one trained vector stands for each element of the factors of all layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.errors import MissingExtraError, StateError

__all__ = ["Assigned", "Assignment"]


class Assignment:
    """Which element of the vector each element of each factor is: every one is used equally often, give or take one.

    Attributes:
        starts: where a site's factors begin among all of them, A before B.
        total: how many elements they have together.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length = length
        self.seed = seed
        self.starts: dict[str, int] = {}
        self.total = 0
        self._drawn: Tensor | None = None

    def place(self, sites: list[Site], r: int) -> None:
        """Lay the factors of all sites out, one after the other."""
        self.starts, self.total, self._drawn = {}, 0, None
        for site in sites:
            self.starts[site.name] = self.total
            self.total += r * (site.fan_in + site.out) * math.prod(site.experts)

    def draw(self) -> Tensor:
        """Return the element for each place, as PEFT draws it, with NumPy."""
        try:
            import numpy
        except ImportError as error:
            raise MissingExtraError("Uni-LoRA's assignment is drawn with NumPy: pip install numpy") from error
        if self._drawn is None:
            stream = numpy.random.default_rng(self.seed)
            times, rest = divmod(self.total, self.length)
            all_of_them = numpy.repeat(numpy.arange(self.length), times)
            if rest:
                all_of_them = numpy.concatenate([all_of_them, stream.choice(self.length, size=rest, replace=False)])
            stream.shuffle(all_of_them)
            self._drawn = torch.as_tensor(all_of_them, dtype=torch.long)
        return self._drawn

    def take(self, site: str, skip: int, count: int, scales: bool) -> Tensor:
        """Return ``count`` elements of a site's factors, or the scales that make the whole map an isometry."""
        if site not in self.starts:
            raise StateError(f"{site!r} is none of the layers that the assignment was laid out for")
        drawn, start = self.draw(), self.starts[site] + skip
        taken = drawn[start : start + count]
        if scales:
            taken = drawn.bincount(minlength=self.length).float().rsqrt()[taken]
            if start + count == self.total:
                self._drawn = None  # the last one asked for; it is as large as all factors together
        return taken


class Assigned:
    """Fill with a part of an assignment."""

    def __init__(self, assignment: Assignment, site: str, skip: int, scales: bool = False) -> None:
        self.assignment, self.site, self.skip, self.scales = assignment, site, skip, scales

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(self.assignment.take(self.site, self.skip, tensor.numel(), self.scales).view(tensor.shape))
