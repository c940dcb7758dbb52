"""How a layer of some shape holds its weight, and the matrix (out, fan_in) that it stands for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from inlay.core.affine import Site

__all__ = ["matrix_of", "stored_dims", "stored_of", "stored_shape"]


def stored_shape(site: Site) -> tuple[int, ...]:
    """Return the shape in which the layer itself holds its weight."""
    if site.elementwise:
        return site.axes or (site.out,)
    if site.transposed and site.kernel:
        return (site.all_channels, site.out // site.groups, *site.kernel)
    if site.transposed or site.lookup:
        return (*site.experts, site.channels, site.out)
    return (*site.experts, site.out, site.channels, *site.kernel)


def stored_dims(site: Site) -> tuple[str, ...]:
    """Return a name for each axis of the stored weight: ``experts``, ``out``, ``in``, ``kernel``."""
    if site.elementwise:
        return ("out",) * len(stored_shape(site))
    axes = ("in", "out") if site.transposed or site.lookup else ("out", "in")
    return ("experts",) * len(site.experts) + axes + ("kernel",) * len(site.kernel)


def matrix_of(site: Site, tensor: Tensor) -> Tensor:
    """Turn a tensor of the stored shape into (*experts, out, fan_in): a view, but for transposed convolutions."""
    if site.elementwise:
        return tensor.reshape(-1, 1)
    if site.transposed and site.kernel:  # each group of inputs has a block (in, out) of its own
        return tensor.unflatten(0, (site.groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return tensor.mT if site.transposed or site.lookup else site.matrix(tensor)


def stored_of(site: Site, weight: Tensor) -> Tensor:
    """The inverse of :func:`matrix_of`."""
    if site.transposed and site.kernel:
        blocks = weight.unflatten(0, (site.groups, -1)).unflatten(2, (site.channels, *site.kernel))
        return blocks.transpose(1, 2).flatten(0, 1)
    if site.transposed or site.lookup:
        return weight.mT
    return weight.reshape(stored_shape(site))
