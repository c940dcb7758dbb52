"""Random places in a weight, drawn as PEFT draws them, so that checkpoints may leave them out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from inlay.core.affine import Site

__all__ = ["Entries", "OffDiagonal", "Places", "drawn_places", "too_many"]


def too_many(site: Site, field: str, count: int) -> str | None:
    """Return one sentence that says that a weight has fewer entries than ``count``, or None."""
    size = site.out * site.fan_in
    return f"a weight of {site.out} x {site.fan_in} has {size} entries, found {field}={count}" if count > size else None


@lru_cache(maxsize=16)
def drawn_places(size: int, count: int, seed: int) -> Tensor:
    """Return ``count`` of ``size`` places."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].clone()


@dataclass(frozen=True)
class Places:
    """Fill with places of a weight of ``size`` entries, which are counted row by row."""

    size: int
    seed: int

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(drawn_places(self.size, tensor.numel(), self.seed))


@dataclass(frozen=True)
class Entries:
    """Fill (2, n) with the rows and columns of entries of a matrix, in the order of the matrix."""

    rows: int
    columns: int
    seed: int | None

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        own = torch.Generator()  # PEFT leaves it as it comes where there is no seed
        if self.seed is not None:
            own.manual_seed(self.seed)
        places = torch.randperm(self.rows * self.columns, generator=own)[: tensor.shape[1]].sort().values
        tensor.copy_(torch.stack([places // self.columns, places % self.columns]))


@dataclass(frozen=True)
class OffDiagonal:
    """Fill (2, n) with rows and columns of entries off the diagonal of one of several square matrices.

    Attributes:
        seed: of the one stream that all of them are drawn from.
        sizes: (size, n) of the matrices up to this one.
    """

    seed: int
    sizes: tuple[tuple[int, int], ...]

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(_off_diagonal(self.seed, self.sizes)[-1])


@lru_cache(maxsize=4)
def _off_diagonal(seed: int, sizes: tuple[tuple[int, int], ...]) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    found = []
    for size, count in sizes:
        chosen = torch.randperm(size * size - size, generator=stream)[:count] if count else torch.empty(0).long()
        rows = torch.div(chosen, max(1, size - 1), rounding_mode="floor")
        columns = chosen % max(1, size - 1)
        found.append(torch.stack([rows, columns + (columns >= rows)]))
    return found
