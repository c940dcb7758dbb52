"""Kinds that are adapted in weight space only: the module runs as it is, with rewritten tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.clone import call_with
from inlay.core.kind import Holder, Kind
from inlay.core.slot import Slot
from inlay.kinds.linear import bare_linear

__all__ = ["Whole"]


class Whole(Kind):
    """A module whose use of its weight cannot be repeated from outside (a norm, attention, a bank of experts)."""

    activation = False

    def run(
        self,
        module: Any,
        site: Site,
        affine: Affine,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype | None = None,
    ) -> Any:
        dtype = dtype or self.weight_dtype(module)
        tensors = {name: tensor.to(dtype) for name, tensor in self.stored(module, site, affine).items()}
        return call_with(module, tensors, (x, *args), kwargs)

    def leaf(self, site: Site, slot: Slot) -> nn.Module:
        if slot.leaf in ("down", "up") and len(slot.shape) == 2:
            return bare_linear(slot.shape[1], slot.shape[0])
        return Holder()
