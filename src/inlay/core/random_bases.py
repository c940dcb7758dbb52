"""Random bases that the layers of a model share, each cut to what a layer needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.core.slot import KaimingUniform
from inlay.errors import ConfigError

__all__ = ["Basis"]


@dataclass(frozen=True)
class Basis:
    """Fill with a random basis of unit deviation, as PEFT draws it: A first, then B from the same stream.

    Attributes:
        seed: of the stream.
        sparsity: one in so many elements is not zero; None for dense bases, drawn in bfloat16.
        after: the shape of A where the tensor is B.
    """

    seed: int
    sparsity: float | None = None
    after: tuple[int, ...] | None = None

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        stream = torch.Generator().manual_seed(self.seed)
        drawn = self.draw(self.after or tuple(tensor.shape), stream)
        if self.after is not None:
            rows, bases, r = tensor.shape
            parts = [(rows, 1, r)] * bases if self.sparsity is None else [(rows, bases, r)]
            drawn = torch.cat([self.draw(shape, stream) for shape in parts], 1)
        deviation = drawn.std()
        if not deviation > 0:
            raise ConfigError(
                f"a sparse basis of shape {tuple(tensor.shape)} was drawn without one element that is not zero; set "
                "another projection_prng_key, or very_sparse=False"
            )
        tensor.copy_(drawn / deviation)

    def draw(self, shape: tuple[int, ...], stream: torch.Generator) -> Tensor:
        if self.sparsity is None:
            dense = torch.empty(shape, dtype=torch.bfloat16)
            KaimingUniform()(dense, stream)
            return dense
        share = 1 / (2 * self.sparsity)
        number = torch.rand(shape, generator=stream)
        return (number > 1 - share).float() - (number < share).float()
