"""The two halves of a low-rank product apart, for methods that choose or mix between them.

Factors may differ from sample to sample: they then have an axis in front, and the input's first axis holds the samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.core.affine import Affine, Site
from inlay.core.kind import Kind
from inlay.kernels.bags import down as down_bags
from inlay.kernels.table import embed_scale, look_up, pad_input
from inlay.kernels.transposed import down as down_transposed

__all__ = ["down", "ranks_last", "up"]


def down(kind: Kind, module: Any, site: Site, x: Tensor, A: Tensor) -> Tensor:
    """Take an input down to the rank, the way the layer reads it.

    Args:
        x: the layer's input.
        A: (r, fan_in), or (samples, r, fan_in). Every group of a grouped convolution reads its channels through it.

    Returns:
        (..., r); of a convolution (samples, groups * r, *places).
    """
    shared = A.dim() == 2
    if site.pooled:
        return down_bags(module, x, A)
    if site.lookup:
        if shared:
            return look_up(module, x, A.t())
        samples, r, size = A.shape
        offsets = torch.arange(samples, device=x.device).view(-1, *([1] * (x.dim() - 1))) * size
        rows = torch.nn.functional.embedding(x + offsets, A.mT.reshape(samples * size, r))
        if module.padding_idx is None:
            return rows
        return torch.where((x == module.padding_idx).unsqueeze(-1), rows.detach(), rows)
    x = x.to(A.dtype)
    if not site.kernel:
        if shared:
            return torch.nn.functional.linear(x, A)
        return torch.bmm(x.reshape(len(A), -1, x.shape[-1]), A.mT).view(*x.shape[:-1], A.shape[1])
    if shared:
        return kind.run(module, site, Affine(A.repeat(site.groups, 1)), x, (), {}, dtype=A.dtype)
    samples, r, _ = A.shape
    if site.transposed:
        t = down_transposed(module, site, x, A)
        return t.view(samples, site.groups * r, *t.shape[2:])
    x, padding = pad_input(module, x)
    weight = A.unsqueeze(1).expand(-1, site.groups, -1, -1).reshape(samples * site.groups * r, -1, *site.kernel)
    flat = x.reshape(1, samples * x.shape[1], *x.shape[2:])
    t = _conv(site)(flat, weight, None, module.stride, padding, module.dilation, samples * site.groups)
    return t.view(samples, site.groups * r, *t.shape[2:])


def up(module: Any, site: Site, t: Tensor, B: Tensor) -> Tensor:
    """Take what :func:`down` returned up to the layer's output.

    Args:
        t: as ``down`` returned it.
        B: (out, r), or (samples, out, r).
    """
    shared = B.dim() == 2
    if site.kernel:
        samples = 1 if shared else len(B)
        weight = B.reshape(samples * site.out, -1, *([1] * len(site.kernel)))
        flat = t if shared else t.reshape(1, samples * t.shape[1], *t.shape[2:])
        y = _conv(site)(flat, weight, None, groups=samples * site.groups)
        return y if shared else y.view(samples, site.out, *y.shape[2:])
    if shared:
        y = torch.nn.functional.linear(t, B)
    else:
        y = torch.bmm(t.reshape(len(B), -1, t.shape[-1]), B.mT).view(*t.shape[:-1], site.out)
    return y * embed_scale(module) if site.lookup else y


def ranks_last(site: Site, t: Tensor) -> Tensor:
    """Turn what :func:`down` returned so that its last axis is the rank's."""
    return t.unflatten(1, (site.groups, -1)).movedim(2, -1) if site.kernel else t


def _conv(site: Site) -> Any:
    functional = torch.nn.functional
    return (functional.conv1d, functional.conv2d, functional.conv3d)[len(site.kernel) - 1]
