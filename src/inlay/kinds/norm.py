"""Norms: layers whose weight multiplies elementwise. Their matrix view has one column: (features, 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.errors import UnsupportedError
from inlay.kinds.whole import Whole

__all__ = ["Norm"]

_TORCH = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    *((nn.RMSNorm,) if hasattr(nn, "RMSNorm") else ()),
)


class Norm(Whole):
    """torch's norms, and any module whose class name ends in ``Norm`` and whose one weight is a vector.

    The second rule takes in the RMS norms that model libraries write themselves (``LlamaRMSNorm``, ``T5LayerNorm``).
    """

    name = "norm"

    def claims(self, module: Any) -> bool:
        if isinstance(module, _TORCH):
            return True
        weight = module._parameters.get("weight")
        return "norm" in type(module).__name__.lower() and weight is not None and weight.dim() == 1

    def site(self, name: str, module: Any) -> Site:
        weight = module._parameters.get("weight")
        if weight is None:
            raise UnsupportedError(f"{name!r} ({type(module).__name__}) has no weight, so there is nothing to adapt")
        return Site(
            name,
            self.name,
            weight.numel(),
            1,
            elementwise=True,
            bias=module._parameters.get("bias") is not None,
            axes=tuple(weight.shape),
        )

    def to_matrix(self, site: Site, stored: Tensor) -> Tensor:
        return stored.reshape(-1, 1)

    def from_matrix(self, site: Site, weight: Tensor) -> Tensor:
        return weight.reshape(site.stored_shape)

    def stored_dims(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def view(self, module: Any, site: Site, weight: Tensor, bias: Tensor | None) -> Affine:
        return super().view(module, site, weight, None if bias is None else bias.reshape(-1))

    def stored(self, module: Any, site: Site, affine: Affine) -> dict[str, Tensor]:
        tensors = super().stored(module, site, affine)
        return {name: tensor.reshape(module._parameters[name].shape) for name, tensor in tensors.items()}
