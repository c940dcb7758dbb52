"""The shortest way through a layer whose samples chose their adapters, where no gradient is wanted.

For batches of a few rows, in which what the host does costs as much as the products; see ``core.ready``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.ready import NotReady, ReadyUpdate, ready_for
from inlay.kernels.switch import fast_paths_on

if TYPE_CHECKING:
    from inlay.core.layer import AdaptedLayer
    from inlay.core.routes import Routes

__all__ = ["run_ready"]

# With more rows than this the products are what counts; with more adapters, stacking them pays (``core.mixed``).
_ROWS, _ADAPTERS = 256, 16


def run_ready(layer: AdaptedLayer, routes: Routes, x: Any) -> Tensor | None:
    """Return the layer's output for samples (samples, *, in), each with its own adapter; None for the ordinary way.

    Args:
        layer: the layer, with nothing merged into it.
        routes: the adapter of each sample.
        x: the only input of the layer.
    """
    if layer.training or type(x) is not Tensor or x.device.type != "cpu" or len(routes.present) > _ADAPTERS:
        return None
    axes = x.dim()
    if not 2 <= axes <= 3 or x.shape[0] != len(routes.names):
        return None
    rows = 1 if axes == 2 else x.shape[1]
    if x.shape[0] * rows > _ROWS:
        return None
    ways = _ways(layer)
    groups, order, inverse = routes.sorted
    work: list[tuple[int, int, Tensor, Tensor, float]] = []
    views = None
    for name, start, stop in groups:
        way = ways.get(name)
        if way is None:
            continue
        if not isinstance(way, ReadyUpdate):
            return None
        views = way.views(x)
        if views is None:
            return None
        down, up = views.down, views.up
        if views.cast:
            down, up = down.to(views.dtype), up.to(views.dtype)
        work.append((start * rows, stop * rows, down, up, way.scale))
    if views is None or not fast_paths_on() or torch._C._get_tracing_state() is not None:
        return None
    ordered = x if order is None else x.index_select(0, order)
    flat = ordered if axes == 2 else ordered.reshape(-1, x.shape[-1])
    y = torch.mm(flat, views.wide) if views.bias is None else torch.addmm(views.bias, flat, views.wide)
    for start, stop, down, up, scale in work:
        part = flat[start:stop]
        if stop - start == 1:  # a matrix times a vector reads the factors with less ado
            y[start].addmv_(up.t(), torch.mv(down.t(), part.view(-1)), alpha=scale)
        else:
            y[start:stop].addmm_(torch.mm(part, down), up, alpha=scale)
    if axes == 3:
        y = y.view(x.shape[0], rows, -1)
    return y if inverse is None else y.index_select(0, inverse)


def _ways(layer: AdaptedLayer) -> dict[str, NotReady]:
    """Return the short way of each adapter of a layer."""
    own = layer.__dict__
    version, held = layer.state.version, own["_ready_by_name"]
    if held[0] != version:
        held = own["_ready_by_name"] = (
            version,
            {name: ready_for(layer, chain) for name, chain in layer.entries.items()},
        )
    found: dict[str, NotReady] = held[1]
    return found
