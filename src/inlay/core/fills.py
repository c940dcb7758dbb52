"""How slots are filled beyond the usual distributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.core.slot import Init

__all__ = ["Doubled", "Given", "Identity", "Transposed", "unit_vector"]


@dataclass(frozen=True)
class Given:
    """Fill with given numbers, or rows of numbers."""

    numbers: Sequence[int] | Sequence[Sequence[float]]

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.copy_(torch.tensor(self.numbers, dtype=tensor.dtype))


@dataclass(frozen=True)
class Identity:
    """Fill square matrices with the identity, and add noise of a standard deviation."""

    noise: float = 0.0

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, self.noise, generator=generator) if self.noise else tensor.zero_()
        tensor.diagonal(dim1=-2, dim2=-1).add_(1.0)


@dataclass(frozen=True)
class Transposed:
    """Draw the transposed matrices; with ``leading``, the two axes in front of them change places too."""

    init: Init
    leading: bool = False

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        turned = (tensor.transpose(-4, -3) if self.leading else tensor).mT
        drawn = tensor.new_empty(turned.shape)
        self.init(drawn, generator)
        turned.copy_(drawn)


@dataclass(frozen=True)
class Doubled:
    """Draw half of the columns; each stands twice."""

    init: Init

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        half = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] // 2)
        self.init(half, generator)
        tensor.copy_(half.repeat_interleave(2, dim=-1))


def unit_vector(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill with a random direction of length 1."""
    tensor.normal_(generator=generator)
    wide = tensor.float()
    tensor.copy_(wide / torch.linalg.vector_norm(wide))
