"""How an update operator is multiplied into a layer's input: a table keyed by (layer kind, operator).

A kind without an entry for an operator gets the generic way, which runs the layer with the dense update as weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Columns, Delta, LowRank, Site
from inlay.core.dtype import product_dtype
from inlay.core.kind import Kind
from inlay.core.reading import Modulated
from inlay.core.structured import Hadamard, Structured
from inlay.parallel.tensors import decide, summed

__all__ = ["FAST", "apply_delta", "embed_scale", "fast_path", "look_up", "pad_input"]

# (kind's name, operator) -> function (module, site, x, delta) -> output share, scale and bias left to the caller
FAST: dict[tuple[str, type[Delta]], Callable[[nn.Module, Site, Tensor, Delta], Tensor]] = {}


def fast_path(
    operator: type[Delta], *kinds: str
) -> Callable[[Callable[[nn.Module, Site, Tensor, Delta], Tensor]], Callable[[nn.Module, Site, Tensor, Delta], Tensor]]:
    """Register a function as the way to multiply by ``operator`` on layers of the named kinds."""

    def enter(
        function: Callable[[nn.Module, Site, Tensor, Delta], Tensor],
    ) -> Callable[[nn.Module, Site, Tensor, Delta], Tensor]:
        for kind in kinds:
            FAST[kind, operator] = function
        return function

    return enter


def apply_delta(kind: Kind, module: nn.Module, site: Site, x: Tensor, delta: Delta, compute: str) -> Tensor:
    """Return what ``delta`` adds to the layer's output for input ``x``.

    Products run in the dtype that ``core.dtype.product_dtype`` says; the output has that dtype.
    """
    function = FAST.get((kind.name, type(delta)))
    if function is None:
        weight = delta.dense()
        dtype = product_dtype(x, weight.dtype, compute)
        if site.lookup and compute == "base":
            dtype = kind.weight_dtype(module) or dtype
        bias = None if delta.bias is None else delta.bias * delta.scale
        return kind.run(module, site, Affine(weight, bias), x, (), {}, dtype=dtype)
    y = function(module, site, x, _cast(kind, module, site, x, delta, compute))
    if not (isinstance(delta.scale, float) and delta.scale == 1.0):
        y = y * delta.scale
    if delta.bias is not None:
        bias = (delta.bias * delta.scale).to(y.dtype)
        y = y + bias.view(-1, *([1] * len(site.kernel)))
    return y


def sum_of(kind: Kind, module: nn.Module, site: Site, y: Tensor, x: Tensor, delta: Delta, compute: str) -> Tensor:
    """Return ``y``, the layer's output, with what ``delta`` adds to it for input ``x``; in the dtype of ``y``."""
    if kind.multiplies and isinstance(delta, LowRank) and all(_plain(t) for t in (y, delta.A, delta.B)):
        cast = _cast(kind, module, site, x, delta, compute)
        assert isinstance(cast, LowRank)
        if cast.A.dtype == y.dtype:  # one kernel adds product and scale
            t = torch.nn.functional.linear(x.to(y.dtype), cast.A)
            scale = delta.scale
            if isinstance(scale, Tensor):  # compiled code reads it anew
                t, scale = t * scale.to(t.dtype), 1.0
            flat, width = y.reshape(-1, y.shape[-1]), t.shape[-1]
            total = torch.addmm(flat, t.reshape(-1, width), cast.B.t(), alpha=float(scale)).view(y.shape)
            return total if delta.bias is None else total + (delta.bias * delta.scale).to(y.dtype)
    return (y + apply_delta(kind, module, site, x, delta, compute)).to(y.dtype)


def _plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested


def _cast(kind: Kind, module: nn.Module, site: Site, x: Tensor, delta: Delta, compute: str) -> Delta:
    """Bring the factors of an update to the dtype that the products run in."""
    if not isinstance(delta, (LowRank, Structured)):
        return delta
    dtype = product_dtype(x, delta.A.dtype if isinstance(delta, LowRank) else delta.dtype, compute)
    if site.lookup and compute == "base":
        dtype = kind.weight_dtype(module) or dtype
    if isinstance(delta, Structured):
        return delta.to(dtype)
    if delta.A.dtype == dtype and delta.B.dtype == dtype:
        return delta
    return LowRank(delta.B.to(dtype), delta.A.to(dtype), groups=delta.groups)


@fast_path(LowRank, "linear")
def _linear(module: nn.Module, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, LowRank)
    functional = torch.nn.functional
    return functional.linear(functional.linear(x.to(delta.A.dtype), delta.A), delta.B)


@fast_path(LowRank, "embedding")
def _embedding(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, LowRank)
    return torch.nn.functional.linear(look_up(module, x, delta.A.t()), delta.B) * embed_scale(module)


@fast_path(Hadamard, "embedding")
def _embedding_product(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """A row of a product is the product of rows, so only the rows that are asked for are made."""
    assert isinstance(delta, Hadamard)
    first, second = (torch.nn.functional.linear(look_up(module, x, B.t()), A) for A, B in delta.factors)
    return first * second * embed_scale(module)


@fast_path(Modulated, "embedding")
def _embedding_modulated(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, Modulated)
    factors = torch.nn.functional.linear(look_up(module, x, delta.A.t()), delta.B)
    return look_up(module, x, delta.weight.t()) * factors * embed_scale(module)


@fast_path(Columns, "embedding")
def _embedding_rows(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """Inputs that are none of the updated rows get zeros."""
    assert isinstance(delta, Columns)
    chosen = decide(_nearest_of, delta.index, x)
    rows = torch.nn.functional.embedding(chosen, delta.values)
    if module.padding_idx is not None:  # as in the layer itself, this row gets no gradient
        rows = torch.where((x == module.padding_idx).unsqueeze(-1), rows.detach(), rows)
    return rows * decide(torch.isin, x, delta.index).unsqueeze(-1) * embed_scale(module)


def _nearest_of(index: Tensor, x: Tensor) -> Tensor:
    """Return where in ``index`` each element of ``x`` stands; anything for one that is not there."""
    ordered, order = index.sort()
    return order[torch.searchsorted(ordered, x).clamp_max(index.numel() - 1)]


def look_up(module: Any, x: Tensor, table: Tensor) -> Tensor:
    """Return the rows of ``table``, (vocabulary, n), that an embedding reads for ``x``, without its scale."""
    rows = torch.nn.functional.embedding(
        x, table, padding_idx=module.padding_idx, scale_grad_by_freq=module.scale_grad_by_freq
    )
    return summed(rows)  # torch cannot multiply rows of a table whose vocabulary is split


def embed_scale(module: nn.Module) -> float | Tensor:
    """Return the factor that a scaled embedding (Gemma, Bart) multiplies into its output."""
    scale = getattr(module, "embed_scale", 1.0)
    return scale if isinstance(scale, (int, float, Tensor)) else 1.0


@fast_path(LowRank, "conv1d", "conv2d", "conv3d")
def _conv(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """Two convolutions: the layer's own geometry down to the rank, then 1x1 (or per group) up to the outputs."""
    assert isinstance(delta, LowRank)
    spatial = len(site.kernel)
    conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[spatial - 1]
    crossing = delta.groups > 1
    down = delta.A.reshape(delta.A.shape[0], -1, *site.kernel)
    up = delta.B.reshape(*delta.B.shape, *([1] * spatial))
    groups = 1
    if site.groups > 1 and not crossing:
        # Every group of outputs sees its own channels through the same A, so A is repeated once per group.
        down = down.repeat(site.groups, *([1] * (spatial + 1)))
        groups = site.groups
    padded, padding = pad_input(module, x.to(down.dtype))
    t = conv(padded, down, None, module.stride, padding, module.dilation, groups)
    return conv(t, up, None, groups=site.groups)


def pad_input(module: Any, x: Tensor) -> tuple[Tensor, Any]:
    """Return the input and the padding argument of a convolution, with other than zero padding done by hand."""
    if module.padding_mode == "zeros":
        return x, module.padding
    return torch.nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0
