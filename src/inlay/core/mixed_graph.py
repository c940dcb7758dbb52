"""A layer under a call that chose adapters by sample, as traced code sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from inlay.core.fused import active_dropout, chain_reason, fused_dtype
from inlay.kernels.routed_op import add_routed

if TYPE_CHECKING:
    from inlay.core.layer import AdaptedLayer
    from inlay.core.routes import Routes

__all__ = ["trace_together"]


def trace_together(
    layer: AdaptedLayer,
    routes: Routes,
    here: tuple[str, ...],
    x: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Run the updates of the adapters ``here`` as one operator; None where something needs the generic way.

    The graph depends on which adapters the batch has, and not on who serves which sample.
    """
    if not layer.kind.multiplies or not x.is_floating_point() or x.dim() < 2 or x.shape[0] != routes.rows.shape[0]:
        return None
    deltas: list[Any] = []
    for name in here:
        chain = layer.entries[name]
        if len(chain) != 1 or chain_reason(layer, chain) is not None:
            return None
        p = layer.params(chain[0])
        delta = chain[0].method.update(chain[0].site, p)
        if active_dropout(p) is not None or delta.bias is not None:
            return None
        deltas.append(delta)
    dtype = fused_dtype(layer, deltas, x)
    A = [delta.A.to(dtype) for delta in deltas]
    B, scales = [], []
    for delta in deltas:
        if isinstance(delta.scale, Tensor):  # a graph reads such a scale anew each time
            B.append((delta.B * delta.scale).to(dtype))
            scales.append(1.0)
        else:
            B.append(delta.B.to(dtype))
            scales.append(float(delta.scale))
    if args:
        y = layer.base_layer(*args, **kwargs)
    else:
        y = layer.base_layer(**kwargs)
    which = [routes.present.index(name) for name in here]
    result: Tensor = add_routed(y, x.to(dtype), A, B, scales, routes.rows, which)
    return result
