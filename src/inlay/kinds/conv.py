"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, with stride, padding, dilation and groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.kind import Holder, Kind
from inlay.core.slot import Slot
from inlay.kernels.table import pad_input

__all__ = ["Conv"]


class Conv(Kind):
    """Weight (out, in / groups, *kernel), flattened to (out, fan_in)."""

    def __init__(self, spatial: int) -> None:
        self.name = f"conv{spatial}d"  # type: ignore[misc]
        self._cls: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
        self._conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[spatial - 1]

    def claims(self, module: Any) -> bool:
        return isinstance(module, self._cls)

    def site(self, name: str, module: Any) -> Site:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        return Site(
            name,
            self.name,
            module.out_channels,
            module.in_channels // module.groups,
            kernel=tuple(module.kernel_size),
            groups=module.groups,
            bias=module.bias is not None,
        )

    def to_matrix(self, site: Site, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def from_matrix(self, site: Site, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], -1, *site.kernel)

    def product(self, module: Any, site: Site, affine: Affine, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or x.dtype
        padded, padding = pad_input(module, x.to(dtype))
        weight = self.from_matrix(site, affine.weight).to(dtype)
        bias = None if affine.bias is None else affine.bias.to(dtype)
        return self._conv(padded, weight, bias, module.stride, padding, module.dilation, site.groups)

    def leaf(self, site: Site, slot: Slot) -> nn.Module:
        if slot.leaf is None or len(slot.shape) != len(site.kernel) + 2:
            return Holder()
        rows, columns = slot.shape[:2]
        ones = (1,) * len(site.kernel)
        down = slot.leaf == "down"
        groups = 1 if down else site.groups
        return self._cls(
            columns * groups, rows, site.kernel if down else ones, groups=groups, bias=False, device="meta"
        )
