"""Structured update operators: a few numbers that make a whole matrix, kept apart until someone needs it dense.

How each is multiplied into features without making the matrix is said in ``kernels.structured``.
"""

from __future__ import annotations

import copy
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from inlay.core.affine import Delta

__all__ = ["BlockLowRank", "Circulant", "Hadamard", "Kron", "Repeated", "Sandwich", "Sparse", "Structured", "Synthesis"]


class Structured(Delta):
    """An update whose factors can be brought to another dtype.

    Attributes:
        factors: the attributes that hold floating-point tensors.
    """

    factors: ClassVar[tuple[str, ...]]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        held: Tensor = getattr(self, self.factors[0])
        return held.dtype

    def to(self, dtype: torch.dtype) -> Structured:
        """Return the update with factors in ``dtype``; this one if they are."""
        if all(getattr(self, name).dtype == dtype for name in self.factors):
            return self
        other = copy.copy(self)
        for name in self.factors:
            setattr(other, name, getattr(self, name).to(dtype))
        return other

    def matrix(self) -> Tensor:
        """Return the update as a matrix (out, fan_in), without its scale."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        return self.matrix() * self.scale


class Hadamard(Delta):
    """The elementwise product of two low-rank updates, ``(A1 B1) * (A2 B2)``.

    Args:
        A1, A2: (*experts, out, r).
        B1, B2: (*experts, r, fan_in).
    """

    def __init__(self, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor) -> None:
        self.factors = ((A1, B1), (A2, B2))
        self.scale = 1.0

    def dense(self) -> Tensor:
        first, second = (torch.matmul(A, B) for A, B in self.factors)
        return first * second * self.scale


class Kron(Structured):
    """The Kronecker product of two matrices.

    Args:
        left: (*experts, a, c).
        right: (*experts, b, d); the update is (*experts, a * b, c * d).
    """

    factors = ("left", "right")

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left = left
        self.right = right
        self.scale = 1.0

    def matrix(self) -> Tensor:
        product = self.left[..., :, None, :, None] * self.right[..., None, :, None, :]
        return product.flatten(-2).flatten(-3, -2)


class Circulant(Structured):
    """Blocks (b, b) whose rows are one vector, turned by one more place in each row: ``block[k, t] = w[t - k]``.

    Args:
        kernel: (*experts, m, n, b), the first row of each block; the update is (*experts, m * b, n * b).
    """

    factors = ("kernel",)

    def __init__(self, kernel: Tensor) -> None:
        self.kernel = kernel
        self.scale = 1.0

    def to(self, dtype: torch.dtype) -> Structured:
        return super().to(torch.promote_types(dtype, torch.float32))  # Fourier transforms know no half precision

    def matrix(self) -> Tensor:
        b = self.kernel.shape[-1]
        first = self.kernel.detach().flatten(0, -2)[0]
        place = torch.ones_like(first, dtype=torch.int64).cumsum(0)  # no arange, which is on no mesh of processes
        turned = self.kernel[..., (place - place.unsqueeze(1)) % b]  # (*experts, m, n, b, b)
        return turned.transpose(-3, -2).flatten(-2).flatten(-3, -2)


class BlockLowRank(Structured):
    """A grid of k x k blocks, each of low rank, whose factors are shared along its row and its column.

    Args:
        A: (*experts, k, fan_in / k, r): the block of inputs n maps to r numbers, r / k for each block of outputs.
        B: (*experts, k, r, out / k): the block of outputs j is made of r numbers, r / k from each block of inputs.
    """

    factors = ("A", "B")

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A = A
        self.B = B
        self.scale = 1.0

    def matrix(self) -> Tensor:
        k = self.A.shape[-3]
        down = self.A.unflatten(-1, (k, -1))  # (..., n, i, j, s)
        up = self.B.unflatten(-2, (k, -1))  # (..., j, n, s, o)
        blocks = torch.einsum("...nijs,...jnso->...joni", down, up)
        return blocks.flatten(-2).flatten(-3, -2)


class Repeated(Structured):
    """One small matrix, laid out again and again over the whole; what reaches over the edges is cut off.

    Args:
        tile: (*experts, m, r).
        out, fan_in: shape of the update.
    """

    factors = ("tile",)

    def __init__(self, tile: Tensor, out: int, fan_in: int) -> None:
        self.tile = tile
        self.out = out
        self.fan_in = fan_in
        self.scale = 1.0

    @property
    def times(self) -> tuple[int, int]:
        """How often the tile stands below itself and beside itself."""
        m, r = self.tile.shape[-2:]
        return -(-self.out // m), -(-self.fan_in // r)

    def matrix(self) -> Tensor:
        repeated = self.tile.repeat(*(1,) * (self.tile.dim() - 2), *self.times)
        return repeated[..., : self.out, : self.fan_in]


class Sparse(Structured):
    """An update of single entries.

    Args:
        rows, columns: (n,) integers, or (*experts, n); no entry twice.
        values: (*experts, n).
        out, fan_in: shape of the update.
    """

    factors = ("values",)

    def __init__(self, rows: Tensor, columns: Tensor, values: Tensor, out: int, fan_in: int) -> None:
        self.rows = rows
        self.columns = columns
        self.values = values
        self.out = out
        self.fan_in = fan_in
        self.scale = 1.0

    def matrix(self) -> Tensor:
        places = self.rows.long() * self.fan_in + self.columns
        flat = self.values.new_zeros(*self.values.shape[:-1], self.out * self.fan_in)
        return flat.scatter(-1, places.expand_as(self.values), self.values).unflatten(-1, (self.out, self.fan_in))


class Synthesis(Protocol):
    """A fixed linear map from ``size`` coefficients to features, with no matrix of its own."""

    size: int

    def __call__(self, coefficients: Tensor) -> Tensor:
        """Map (..., size) to (..., features)."""

    def transpose(self, features: Tensor) -> Tensor:
        """Map (..., features) to (..., size), by the transposed matrix."""


class Sandwich(Structured):
    """``S_out C S_in^T``: sparse coefficients between two fixed maps.

    Args:
        core: the coefficients, (out's size, input's size).
        out: maps them to the rows of the update.
        inputs: maps them to its columns.
    """

    factors = ("values",)

    def __init__(self, core: Sparse, out: Synthesis, inputs: Synthesis) -> None:
        self.core = core
        self.out = out
        self.inputs = inputs
        self.scale = 1.0

    @property
    def values(self) -> Tensor:
        """The coefficients' values."""
        return self.core.values

    @values.setter
    def values(self, values: Tensor) -> None:
        self.core = copy.copy(self.core)
        self.core.values = values

    def matrix(self) -> Tensor:
        return self.out(self.inputs(self.core.matrix()).mT).mT
