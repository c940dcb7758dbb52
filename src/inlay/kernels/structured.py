"""Structured updates multiplied into features without making their matrix."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from inlay.core.affine import Delta, Site
from inlay.core.structured import BlockLowRank, Circulant, Kron, Repeated, Sandwich, Sparse
from inlay.kernels.table import embed_scale, fast_path, pad_input
from inlay.parallel.tensors import is_distributed

__all__: list[str] = []

_SHORT_BLOCK = 16  # below it two Fourier transforms cost more than the rows of a circulant block
_CONVS = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)


# -- linear layers ----------------------------------------------------------------------------------------------------


@fast_path(Kron, "linear")
def _kron(module: nn.Module, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """``(L (x) R) x = L X R^T`` with x as a matrix X: two small products instead of one large one."""
    assert isinstance(delta, Kron)
    (a, c), (b, d) = delta.left.shape, delta.right.shape
    wide = x.to(delta.dtype).unflatten(-1, (c, d))
    if c * b * (a + d) <= a * d * (b + c):
        return _times(_times(wide, delta.right).mT, delta.left).mT.flatten(-2)
    return _times(_times(wide.mT, delta.left).mT, delta.right).flatten(-2)


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the last axis: one product of matrices, however x lies in memory and whether gradients are wanted."""
    return linear(x.reshape(-1, x.shape[-1]), weight).unflatten(0, x.shape[:-1])


@fast_path(Circulant, "linear")
def _circulant(module: nn.Module, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """A circulant block correlates, which is a product by frequency."""
    assert isinstance(delta, Circulant)
    _, n, b = delta.kernel.shape
    wide = x.to(delta.dtype)
    if b < _SHORT_BLOCK or is_distributed(delta.kernel) or is_distributed(x):
        return linear(wide, delta.matrix())
    spectrum = torch.fft.rfft(wide.unflatten(-1, (n, b)))
    weights = torch.fft.rfft(delta.kernel).conj()
    return torch.fft.irfft(torch.einsum("...nf,mnf->...mf", spectrum, weights), n=b).flatten(-2)


@fast_path(BlockLowRank, "linear")
def _blocks(module: nn.Module, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, BlockLowRank)
    wide = x.to(delta.dtype).unflatten(-1, (delta.A.shape[0], -1))
    return _from_ranks(torch.einsum("...ni,nir->...nr", wide, delta.A), delta)


def _from_ranks(t: Tensor, delta: BlockLowRank) -> Tensor:
    """Turn the ranks (..., blocks of inputs, r) into outputs; each block of outputs has its part of every one."""
    k = delta.B.shape[0]
    exchanged = t.unflatten(-1, (k, -1)).transpose(-3, -2).flatten(-2)
    return torch.einsum("...jr,jro->...jo", exchanged, delta.B).flatten(-2)


@fast_path(Repeated, "linear")
def _repeated(module: nn.Module, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """Features that meet the same column of the tile are summed first."""
    assert isinstance(delta, Repeated)
    r = delta.tile.shape[1]
    wide = torch.nn.functional.pad(x.to(delta.dtype), (0, -delta.fan_in % r))
    return _laid_out(linear(wide.unflatten(-1, (-1, r)).sum(-2), delta.tile), delta)


def _laid_out(y: Tensor, delta: Repeated) -> Tensor:
    """Repeat (..., m) over all outputs."""
    times = delta.times[0]
    return y if times == 1 else y.repeat(*(1,) * (y.dim() - 1), times)[..., : delta.out]


@fast_path(Sparse, "linear")
def _sparse(module: nn.Module, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, Sparse)
    wide = x.to(delta.dtype)
    return _entries(wide, delta) if _is_few(delta, x) else linear(wide, delta.matrix())


def _is_few(core: Sparse, x: Tensor) -> bool:
    """Whether entries taken one by one need no more memory than the matrix, or than the features themselves."""
    entries, size = core.values.numel(), core.out * core.fan_in
    return entries <= core.out + core.fan_in or entries * (x.numel() // max(1, x.shape[-1])) <= size


def _entries(x: Tensor, core: Sparse) -> Tensor:
    """Multiply features (..., fan_in) by single entries."""
    moved = x.index_select(-1, core.columns) * core.values
    return moved.new_zeros(*x.shape[:-1], core.out).index_add(-1, core.rows, moved)


@fast_path(Sandwich, "linear")
def _sandwich(module: nn.Module, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, Sandwich)
    wide = x.to(delta.dtype)
    if not _is_few(delta.core, x) or is_distributed(delta.values) or is_distributed(x):
        return linear(wide, delta.matrix())
    return delta.out(_entries(delta.inputs.transpose(wide), delta.core))


# -- embeddings: only the rows that are asked for are made ------------------------------------------------------------


def _row(module: Any, x: Tensor, rows: Tensor) -> Tensor:
    """Give a padding token no gradient, as the layer itself does, and scale the rows as it does."""
    if module.padding_idx is not None:
        rows = torch.where((x == module.padding_idx).unsqueeze(-1), rows.detach(), rows)
    return rows * embed_scale(module)


def _by_frequency(module: Any, x: Tensor, matrix: Tensor) -> Tensor:
    """Look rows up in the whole table: gradients by a token's frequency belong to whole rows."""
    rows = torch.nn.functional.embedding(x, matrix.t(), module.padding_idx, scale_grad_by_freq=True)
    return rows * embed_scale(module)


@fast_path(Kron, "embedding")
def _kron_rows(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, Kron)
    if module.scale_grad_by_freq:
        return _by_frequency(module, x, delta.matrix())
    d = delta.right.shape[1]
    left, right = delta.left.t()[x // d], delta.right.t()[x % d]
    return _row(module, x, (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2))


@fast_path(Circulant, "embedding")
def _circulant_rows(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, Circulant)
    if module.scale_grad_by_freq:
        return _by_frequency(module, x, delta.matrix())
    b = delta.kernel.shape[-1]
    rows = delta.kernel.transpose(0, 1)[x // b]  # (..., m, b)
    place = (x.unsqueeze(-1) - torch.arange(b, device=x.device)) % b
    return _row(module, x, rows.gather(-1, place.unsqueeze(-2).expand_as(rows)).flatten(-2))


@fast_path(BlockLowRank, "embedding")
def _block_rows(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, BlockLowRank)
    if module.scale_grad_by_freq:
        return _by_frequency(module, x, delta.matrix())
    k, width, _ = delta.A.shape
    t = delta.A.flatten(0, 1)[x]
    own = torch.nn.functional.one_hot(x // width, k).to(t.dtype)  # a token lies in one block of inputs
    return _row(module, x, _from_ranks(own.unsqueeze(-1) * t.unsqueeze(-2), delta))


@fast_path(Repeated, "embedding")
def _repeated_rows(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, Repeated)
    if module.scale_grad_by_freq:
        return _by_frequency(module, x, delta.matrix())
    return _row(module, x, _laid_out(delta.tile.t()[x % delta.tile.shape[1]], delta))


@fast_path(Sparse, "embedding")
def _sparse_rows(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """Each token that is asked for stands for a row of a small table, which its entries are put into."""
    assert isinstance(delta, Sparse)
    if module.scale_grad_by_freq:
        return _by_frequency(module, x, delta.matrix())
    count, flat = x.numel(), x.flatten()
    home = flat.new_full((delta.fan_in,), count)  # tokens that are not asked for share a last row, which none reads
    home = home.index_put((flat,), torch.arange(count, device=x.device, dtype=flat.dtype))
    places = home[delta.columns] * delta.out + delta.rows
    table = delta.values.new_zeros((count + 1) * delta.out).index_add(0, places, delta.values)
    return _row(module, x, table.view(count + 1, delta.out)[home[x]])


# -- convolutions -----------------------------------------------------------------------------------------------------


@fast_path(Kron, "conv1d", "conv2d", "conv3d")
def _kron_conv(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """The right factor is a kernel that all parts of the channels share, the left one mixes the parts."""
    assert isinstance(delta, Kron)
    spatial, c = len(site.kernel), delta.left.shape[1]
    conv = _CONVS[spatial - 1]
    padded, padding = pad_input(module, x.to(delta.dtype))
    if site.groups > 1 or delta.right.shape[1] % math.prod(site.kernel):
        weight = delta.matrix().unflatten(-1, (site.channels, *site.kernel))
        return conv(padded, weight, None, module.stride, padding, module.dilation, site.groups)
    channel = -1 - spatial
    parts = padded.unflatten(channel, (c, -1))
    kernel = delta.right.unflatten(-1, (-1, *site.kernel))
    t = conv(parts.flatten(0, channel - 1), kernel, None, module.stride, padding, module.dilation)
    t = t.unflatten(0, parts.shape[: -1 - spatial])  # (..., c, b, *positions)
    mixed = torch.tensordot(t, delta.left, ([channel - 1], [1])).movedim(-1, channel - 1)
    return mixed.flatten(channel - 1, channel)


@fast_path(BlockLowRank, "conv1d", "conv2d", "conv3d")
def _block_conv(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """Two convolutions in groups: blocks of channels down to the ranks, and ranks up to blocks of outputs."""
    assert isinstance(delta, BlockLowRank)
    spatial, k = len(site.kernel), delta.A.shape[0]
    conv = _CONVS[spatial - 1]
    padded, padding = pad_input(module, x.to(delta.dtype))
    if site.groups > 1 or site.channels % k:
        weight = delta.matrix().unflatten(-1, (site.channels, *site.kernel))
        return conv(padded, weight, None, module.stride, padding, module.dilation, site.groups)
    channel = -1 - spatial
    down = delta.A.mT.flatten(0, 1).unflatten(-1, (-1, *site.kernel))
    up = delta.B.mT.flatten(0, 1).unflatten(-1, (-1, *(1,) * spatial))
    t = conv(padded, down, None, module.stride, padding, module.dilation, k)
    exchanged = t.unflatten(channel, (k, k, -1)).transpose(channel - 2, channel - 1).flatten(channel - 2, channel)
    return conv(exchanged, up, groups=k)
