"""Random places among the wavelet coefficients of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.core.places import drawn_places

__all__ = ["Coefficients"]


@dataclass(frozen=True)
class Coefficients:
    """Fill with rows and columns of the trained coefficients, low-pass ones first along both axes.

    Attributes:
        out, fan_in: shape of the update; PEFT draws as many places, and moves them to the middle of
        rows, columns: how many coefficients there are.
        seed: what they are drawn from.
        crossed: the quadrants with one high-pass axis change places.
    """

    out: int
    fan_in: int
    rows: int
    columns: int
    seed: int
    crossed: bool

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        places = drawn_places(self.out * self.fan_in, tensor.shape[1], self.seed)
        row = places // self.fan_in + (self.rows - self.out) // 2
        column = places % self.fan_in + (self.columns - self.fan_in) // 2
        if self.crossed:  # the quadrant above right is high-pass along the rows in PEFT, the one below left is not
            mixed = (row < self.rows // 2) != (column < self.columns // 2)
            row = torch.where(mixed, (row + self.rows // 2) % self.rows, row)
            column = torch.where(mixed, (column + self.columns // 2) % self.columns, column)
        tensor.copy_(torch.stack([row, column]))
