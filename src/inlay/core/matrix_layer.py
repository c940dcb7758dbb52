"""A layer as its matrix view: what functions of users that read a layer are given."""

from __future__ import annotations

from torch import nn

from inlay.core.affine import Affine

__all__ = ["matrix_layer"]


def matrix_layer(affine: Affine) -> nn.Linear:
    """Return a linear layer that has the weight (out, fan_in) and the bias of an affine map, without copying them."""
    out, fan_in = affine.weight.shape
    layer = nn.Linear(fan_in, out, bias=affine.bias is not None, device="meta", dtype=affine.weight.dtype)
    for name, tensor in (("weight", affine.weight), ("bias", affine.bias)):
        if tensor is not None:
            held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            layer._parameters[name] = held
    return layer
