"""Structured updates of some output rows, multiplied into features without making their matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inlay.core.affine import Delta, Site
from inlay.core.output_rows import RowsOf, spread_rows
from inlay.kernels.table import FAST, fast_path

__all__: list[str] = []


@fast_path(RowsOf, "linear")
def _rows(module: nn.Module, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """What the slice itself gives, between features of zeros."""
    assert isinstance(delta, RowsOf)
    part = delta.part
    function = FAST.get(("linear", type(part)))
    if function is None:
        y = torch.nn.functional.linear(x.to(part.dtype), part.matrix())
    else:
        y = function(module, site, x, part)
    return spread_rows(delta.rows, delta.out, y * part.scale, -1)
