"""Rotations of what a layer reads: of its inputs, of the patches under a kernel, of the rows of a table.

``Rotation`` is an orthogonal (or nearly orthogonal) matrix R of which only ``x R - x`` is ever computed, so that the
identity changes no bit. ``InputRotation`` is a method that reads ``x R`` where the layer read ``x``; a method of this
family says what R is made of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.affine import Affine, Site
from inlay.core.method import Method, P
from inlay.core.slot import Init, Slot, zeros
from inlay.parallel.tensors import in_blocks

if TYPE_CHECKING:
    from inlay.core.inner import Inner

__all__ = ["Butterfly", "InputRotation", "Reflections", "Rotation", "Triangle", "cayley", "cayley_series", "skew"]


# -- rotations --------------------------------------------------------------------------------------------------------


class Rotation:
    """A matrix R that turns vectors block by block.

    Attributes:
        size: features in a block; no block meets another.
    """

    size: int

    def change(self, x: Tensor) -> Tensor:
        """Return ``x R - x`` for x of shape (..., blocks, size)."""
        raise NotImplementedError

    @property
    def transposed(self) -> Rotation:
        """The way back: R^T."""
        raise NotImplementedError

    def to(self, dtype: torch.dtype) -> Rotation:
        """Return the rotation in another dtype."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def turned(self, x: Tensor) -> Tensor:
        """Return ``x R`` in the dtype of the rotation; the last axis of ``x`` holds the features."""
        wide = x.to(self.dtype)
        return wide + in_blocks(wide, self.size, self.change)

    def matrix(self, features: int) -> Tensor:
        """Return R, (features, features)."""
        return self.turned(torch.eye(features, dtype=self.dtype, device=self.device))

    @property
    def device(self) -> torch.device:
        raise NotImplementedError


class Butterfly(Rotation):
    """``B_(m-1) ... B_0``, each block-diagonal: a block of B_i joins two halves of blocks that lie 2^i halves apart.

    Args:
        turns: (*experts, m, n, b, b), each block less the identity.
        reverse: multiply B_0 first.
    """

    def __init__(self, turns: Tensor, reverse: bool = False) -> None:
        self.turns = turns
        self.reverse = reverse
        self.size = turns.shape[-1] * 2 ** (turns.shape[-4] - 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.turns.dtype

    @property
    def device(self) -> torch.device:
        return self.turns.device

    @property
    def transposed(self) -> Rotation:
        return Butterfly(self.turns.mT, not self.reverse)

    def to(self, dtype: torch.dtype) -> Rotation:
        return self if dtype == self.dtype else Butterfly(self.turns.to(dtype), self.reverse)

    def change(self, x: Tensor) -> Tensor:
        turns = self.turns if self.turns.dim() == 4 else self.turns.unsqueeze(-5)  # experts have rows of their own
        factors = turns.shape[-4]
        if factors == 1:  # the blocks of x are the blocks of the matrix
            return torch.einsum("...rk,...rkc->...rc", x, turns.squeeze(-4))
        half = self.turns.shape[-1] // 2
        y = x
        for i in range(factors) if self.reverse else reversed(range(factors)):
            pairs = y.reshape(*x.shape[:-2], -1, 2, 2**i, half).transpose(-2, -3)
            blocks = pairs.reshape(*x.shape[:-2], -1, 2 * half)
            turned = torch.einsum("...rk,...rkc->...rc", blocks, turns.select(-4, i))
            back = turned.reshape(*x.shape[:-2], -1, 2**i, 2, half).transpose(-2, -3)
            y = y + back.reshape(y.shape)
        return y - x


class Reflections(Rotation):
    """``I - U T U^T``, a product of reflections at planes.

    Args:
        U: (*experts, features, r), the normals.
        T: (*experts, r, r).
    """

    def __init__(self, U: Tensor, T: Tensor) -> None:
        self.U = U
        self.T = T
        self.size = U.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        return self.U.dtype

    @property
    def device(self) -> torch.device:
        return self.U.device

    @property
    def transposed(self) -> Rotation:
        return Reflections(self.U, self.T.mT)

    def to(self, dtype: torch.dtype) -> Rotation:
        return self if dtype == self.dtype else Reflections(self.U.to(dtype), self.T.to(dtype))

    def change(self, x: Tensor) -> Tensor:
        # products by einsum, whose rounding does not depend on which of the tensors train
        U, T = (t if t.dim() == 2 else t.unsqueeze(-3) for t in (self.U, self.T))  # experts have rows of their own
        along = torch.einsum("...bn,...nr->...br", x, U)
        return -torch.einsum("...bs,...ns->...bn", torch.einsum("...br,...rs->...bs", along, T), U)


# -- skew-symmetric matrices and what they give ----------------------------------------------------------------------


@dataclass(frozen=True)
class Triangle:
    """Fill with what makes a skew-symmetric matrix, row by row, of the entries above its diagonal.

    Attributes:
        size: rows of the matrix.
        signs: fill with 1 above the diagonal, -1 below and 0 on it; otherwise with the entry to take.
    """

    size: int
    signs: bool

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        rows, columns = torch.triu_indices(self.size, self.size, 1)
        square = torch.zeros(self.size, self.size, dtype=tensor.dtype)
        square[rows, columns] = 1 if self.signs else torch.arange(rows.numel(), dtype=tensor.dtype)
        tensor.copy_((square - square.t() if self.signs else square + square.t()).flatten())

    @staticmethod
    def slots(site: Site, key: str, dims: str, init: Init = zeros, *, b: int, **sizes: int) -> dict[str, Slot]:
        """Return the slots of skew-symmetric b x b matrices: the trained ``entries``, and how they are laid out.

        Args:
            key: of a module with an asterisk, below which the tensors hang.
            dims: of the entries, their number (``n``) last.
        """
        fixed: dict[str, Any] = {"buffer": True, "saved": False, "trainable": False}
        wide: dict[str, Any] = {**sizes, "n": b * (b - 1) // 2, "square": b * b}
        whole = {**fixed, "dtype": torch.int64}
        return {
            "entries": site.slot(f"{key}.weight", dims, init, **wide),
            "index": site.slot(f"{key}.index", "square", Triangle(b, False), options=whole, **wide),
            "signs": site.slot(f"{key}.signs", "square", Triangle(b, True), options=fixed, **wide),
        }


def skew(p: P, b: int) -> Tensor:
    """Return the skew-symmetric matrices, (..., b, b), that the slots of :meth:`Triangle.slots` hold."""
    entries = p.entries if p.entries.dtype == torch.float64 else p.entries.float()
    if b == 1:
        return entries.new_zeros(*entries.shape[:-1], 1, 1)
    return (entries[..., p.index] * p.signs).unflatten(-1, (b, b))


def cayley(Q: Tensor) -> Tensor:
    """Return ``(I - Q)(I + Q)^-1 - I``, a rotation less the identity if Q is skew-symmetric; (..., b, b)."""
    identity = torch.diag_embed(torch.ones_like(Q[..., 0]))
    return torch.linalg.solve(identity + Q, -2 * Q, left=False)


def cayley_series(Q: Tensor, terms: int) -> Tensor:
    """Return ``2Q + 2Q^2 + ... + Q^k``, the first terms of ``cayley(-Q)``; 3 terms give 4, as in PEFT."""
    if terms == 1:
        return torch.zeros_like(Q)
    if terms == 2:
        return 2 * Q
    total, power = 2 * Q, Q
    for _ in range(4, max(terms, 4)):
        power = power @ Q
        total = total + 2 * power
    power = power @ Q
    return total + 2 * power + power @ Q


# -- methods ----------------------------------------------------------------------------------------------------------


class InputRotation(Method):
    """A method for which the layer reads ``x R``; an embedding gives its rows turned.

    A subclass gives ``slots`` and ``rotation``.
    """

    def rotation(self, site: Site, p: P) -> Rotation:
        """Return R, for vectors of :meth:`features` elements."""
        raise NotImplementedError

    def varied(self, site: Site, p: P) -> Rotation:
        """Return R with what is dropped of it in training."""
        return self.rotation(site, p)

    @staticmethod
    def features(site: Site) -> int:
        """Length of the vectors that are rotated: a row of an embedding, a patch under a convolution's kernel."""
        return site.out if site.lookup else site.all_channels * math.prod(site.kernel)

    def unrotatable(self, site: Site, size: int) -> str | None:
        """Return one sentence that says why blocks of ``size`` features cannot be rotated at a site, or None."""
        if self.features(site) == 1 or size == 1:
            return f"blocks of one feature (of {self.features(site)}) cannot be rotated"
        if site.groups > 1 and site.fan_in % size:
            return (
                f"a block of {size} features reaches across the groups of the convolution, whose weight cannot hold "
                f"that; {self.smaller(site)}"
            )
        return None

    def smaller(self, site: Site) -> str:
        """Say what to do about a block that reaches across the groups of a convolution."""
        return "leave the layer out"

    def delta_weight(self, site: Site, p: P, base: Affine) -> Tensor:
        return self.rotation(site, p).matrix(self.features(site))

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        return self.rotated(site, layer, self.rotation(site, p))

    @staticmethod
    def rotated(site: Site, layer: Affine, rotation: Rotation) -> Affine:
        """Return ``layer`` with its weight rotated."""
        weight = layer.weight
        rotation = rotation.to(torch.promote_types(weight.dtype, rotation.dtype))
        if site.lookup:
            return Affine(rotation.turned(weight.mT).mT, layer.bias)
        if site.groups == 1:
            return Affine(rotation.transposed.turned(weight), layer.bias)
        # Each group of outputs reads features of its own: side by side, the rows of all groups read all features.
        rows = weight.unflatten(0, (site.groups, -1)).transpose(0, 1)
        turned = rotation.transposed.turned(rows.flatten(1)).unflatten(1, (site.groups, -1))
        return Affine(turned.transpose(0, 1).reshape(weight.shape), layer.bias)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        rotation = self.varied(site, p)
        if site.lookup:
            return self.read(inner(x), rotation, inner)
        if math.prod(site.kernel) > 1:  # one patch overlaps the next, so only the weight can take the rotation
            return inner.run(x, self.rotated(site, inner.affine(), rotation))
        if site.kernel:
            return inner(site.channels_back(self.read(site.channels_last(x), rotation, inner)))
        return inner(self.read(x, rotation, inner))

    @staticmethod
    def read(x: Tensor, rotation: Rotation, inner: Inner) -> Tensor:
        """Rotate the last axis of ``x``."""
        return rotation.to(inner.product_dtype(x, rotation.dtype)).turned(x).to(x.dtype)
