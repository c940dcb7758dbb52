"""Methods that add an update which is made from a weight: from the untouched one, or from what is below."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.affine import Affine, Delta, Dense, Site
from inlay.core.method import Inner, Method, P

__all__ = ["Modulated", "ReadsBase", "ReadsBelow"]


class Modulated(Delta):
    """The elementwise product of a weight with a low-rank matrix, ``W * (B A)``.

    Args:
        weight: (*experts, out, fan_in), the untouched weight.
        B: (*experts, out, r).
        A: (*experts, r, fan_in).
    """

    def __init__(self, weight: Tensor, B: Tensor, A: Tensor) -> None:
        self.weight = weight
        self.B = B
        self.A = A
        self.scale = 1.0

    def dense(self) -> Tensor:
        return self.weight * torch.matmul(self.B, self.A) * self.scale


class ReadsBase(Method):
    """What is added depends on the untouched weight, and on nothing else below: several adapters add up.

    A subclass gives ``slots`` and ``change``.
    """

    def change(self, site: Site, p: P, base: Affine) -> Delta:
        """Return the update before ``p.scaling``, as an operator of its own for each call."""
        raise NotImplementedError

    @property
    def commutes(self) -> bool:
        return True

    def delta_weight(self, site: Site, p: P, base: Affine) -> Tensor:
        return site.to_stored(self.change(site, p, base).scaled(p.scaling).dense())

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        return layer.add(self.change(site, p, base).scaled(p.scaling))

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        return inner.plus(x, p, self.change(site, p, inner.base_affine()).scaled(p.scaling))


class ReadsBelow(Method):
    """What is added depends on the weight as it is below, so that the order of adapters matters.

    A subclass gives ``slots`` and ``change``.
    """

    def change(self, site: Site, p: P, weight: Tensor) -> Tensor:
        """Return what is added to a weight, (*experts, out, fan_in)."""
        raise NotImplementedError

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        return Affine(layer.weight + self.change(site, p, layer.weight), layer.bias)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        dropped = p.drop(x)
        if dropped is x:
            return super().forward(site, p, x, inner)
        y = inner(x)
        return (y + inner.apply(dropped, Dense(self.change(site, p, inner.affine().weight)))).to(y.dtype)
