"""Low-rank updates whose A gets its gradient from compressed inputs (VeLoRA).

``A x`` is taken with A held constant, so that backward does not need x for it. What A's gradient comes from is a second
product that is subtracted from itself: that of the few numbers kept of each token with A contracted in the same way,
``(A v) (v^T x) = A (v v^T x)`` by sub-token. Its backward keeps those numbers, and its gradient is A's for inputs
``v v^T x``, which are never made.

Shapes: x (*, in), v (in / pieces,), kept (*, pieces), A (r, in), A v (r, pieces).
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from inlay.core.affine import Delta, LowRank, Site
from inlay.core.compressed import Compressed
from inlay.kernels.table import FAST, fast_path

__all__: list[str] = []


def _gradient_of(product: Tensor, strength: float) -> Tensor:
    """Return zeros with the gradient of ``strength * product``."""
    scaled = product * strength
    return scaled - scaled.detach()


@fast_path(Compressed, "linear")
def _linear(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, Compressed)
    x = x.to(delta.dtype)
    t = linear(x, delta.A.detach())
    if delta.A.requires_grad:
        kept, direction = delta.project(x, -1)
        t = t + _gradient_of(linear(kept, delta.cut(delta.A, -1) @ direction), delta.strength)
    return linear(t, delta.B)


@fast_path(Compressed, "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """Sub-tokens are cut from the channels at each place; the layer's geometry goes over what is kept of them."""
    assert isinstance(delta, Compressed)
    run = FAST[site.kind, LowRank]
    x = x.to(delta.dtype)
    y = run(module, site, x, delta.plain(A=delta.A.detach()))
    if not delta.A.requires_grad:
        return y
    kept, direction = delta.project(x, -1 - len(site.kernel))
    places = delta.A.unflatten(-1, (-1, math.prod(site.kernel)))
    narrow = (delta.cut(places, 1) @ direction).mT.flatten(1)
    return y + _gradient_of(run(module, site, kept, delta.plain(narrow, delta.B.detach())), delta.strength)
