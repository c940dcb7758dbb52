"""``nn.ConvTranspose1d``, ``2d`` and ``3d``, with groups, dilation and output_padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.kind import Kind
from inlay.kernels.transposed import Geometry

__all__ = ["ConvTranspose"]


class ConvTranspose(Kind):
    """Weight (in, out / groups, *kernel); the matrix view has a row for each output channel.

    A call may choose among the sizes that a stride makes ambiguous (``output_size``): what adapters add has that size.
    """

    takes_arguments = True

    def __init__(self, spatial: int) -> None:
        self.name = f"conv_transpose{spatial}d"  # type: ignore[misc]  # one for each dimension
        self._cls: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]

    def claims(self, module: Any) -> bool:
        return isinstance(module, self._cls)

    def site(self, name: str, module: Any) -> Site:
        return Site(
            name,
            self.name,
            module.out_channels,
            module.in_channels // module.groups,
            kernel=tuple(module.kernel_size),
            groups=module.groups,
            bias=module.bias is not None,
            transposed=True,
        )

    def to_matrix(self, site: Site, stored: Tensor) -> Tensor:
        return site.from_stored(stored)

    def from_matrix(self, site: Site, weight: Tensor) -> Tensor:
        return site.to_stored(weight)

    def stored_dims(self, site: Site) -> tuple[str, ...]:
        return site.stored_dims

    def called(self, module: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        size = args[0] if args else kwargs.get("output_size")
        return module if size is None else Geometry(module, x, size)

    def product(self, module: Any, site: Site, affine: Affine, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or x.dtype
        weight = self.from_matrix(site, affine.weight).to(dtype)
        bias = None if affine.bias is None else affine.bias.to(dtype)
        return Geometry.spread(module, site, x.to(dtype), weight, bias, site.groups)
