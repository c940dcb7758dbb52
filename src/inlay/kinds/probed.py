"""Layers that nobody registered and that are linear all the same: a trial decides, on inputs and weights at random."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.clone import call_with
from inlay.errors import TargetError
from inlay.kinds.linear import Linear

__all__ = ["Probed", "probed"]

_DIGITS = 0.25  # of a dtype's digits, what may be lost: a layer may sum in an order, and in steps, of its own


class Probed(Linear):
    """A module with a ``weight`` of two axes, and maybe a ``bias``, that computes ``x W^T + b`` or ``x W + b``.

    It runs by its own forward pass, with rewritten tensors where a method asks for them.

    Args:
        transposed: the weight is stored as (in, out).
    """

    multiplies = True

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed

    def claims(self, module: Any) -> bool:
        return False  # not by its class

    def site(self, name: str, module: Any) -> Site:
        out, channels = reversed(module.weight.shape) if self.transposed else module.weight.shape
        bias = module._parameters.get("bias") is not None
        return Site(name, self.name, int(out), int(channels), bias=bias, transposed=self.transposed)

    def run(
        self,
        module: Any,
        site: Site,
        affine: Affine,
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        dtype = dtype or x.dtype
        tensors = {self.weight_name: self.from_matrix(site, affine.weight).to(dtype)}
        if site.bias:
            bias = affine.bias if affine.bias is not None else affine.weight.new_zeros(site.out)
            tensors[self.bias_name] = bias.to(dtype)
        y: Tensor = call_with(module, tensors, (x.to(dtype), *args), kwargs)
        return y if site.bias or affine.bias is None else y + affine.bias.to(y.dtype)

    def plain_tensors(self, module: Any) -> tuple[Tensor, Tensor | None] | None:
        return None


def probed(path: str, module: nn.Module) -> Probed | None:
    """Return a kind for a module that no kind claims, if it computes an affine map of features.

    Args:
        path: where it is, for messages.
        module: any module; it is left as it is.

    Returns:
        None where it does not have the tensors of a linear layer.

    Raises:
        TargetError: it has, and computes something else, or cannot be tried.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or (bias is not None and bias.dim() != 1):
        return None
    what = f"{path!r} ({type(module).__name__})"
    if weight.is_meta:
        raise TargetError(f"{what} is of no known kind, and on the meta device it cannot be tried whether it is affine")
    worst: float | None = None
    refused: Exception | None = None
    for transposed in (False, True):
        if bias is not None and len(bias) != weight.shape[1 if transposed else 0]:
            continue
        try:
            with torch.random.fork_rng([weight.device] if weight.is_cuda else []):  # a layer may draw noise
                error = _error(module, weight, bias, transposed)
        except Exception as caught:  # whatever a module of others raises at features it does not take
            refused = caught
            continue
        if error is None:
            return Probed(transposed)
        worst = error if worst is None else min(worst, error)
    if worst is not None:
        raise TargetError(
            f"{what} is not affine: its output differs from x W^T + b by {worst:.3g} of its size, so what an adapter "
            "would add to W is not known; register a kind for it (inlay.register), or name the layers inside it"
        )
    raise TargetError(f"{what} is of no known kind and takes no features of its weight's size: {refused}")


@torch.no_grad()
def _error(module: nn.Module, weight: Tensor, bias: Tensor | None, transposed: bool) -> float | None:
    """Return by how much outputs are off the affine model's, at most, as a share of their size; None if it is nothing.

    The layer is tried with its own tensors and with others, in float64 where it runs in that.
    """
    generator = torch.Generator().manual_seed(0)
    features = weight.shape[0 if transposed else 1]
    wide = torch.float64 if weight.dtype != torch.float64 and weight.device.type != "mps" else weight.dtype
    try:
        return _trials(module, weight, bias, transposed, features, wide, generator)
    except RuntimeError:  # it holds further tensors, of its own dtype
        return _trials(module, weight, bias, transposed, features, weight.dtype, generator)


def _trials(
    module: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    features: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> float | None:
    worst = 0.0
    for size, shape in ((1.0, (3,)), (30.0, (2, 3)), (0.01, (3,))):
        for changed in (False, True):
            tensors = {"weight": weight.detach().to(dtype)}
            if bias is not None:
                tensors["bias"] = bias.detach().to(dtype)
            if changed:
                for name, tensor in tensors.items():
                    noise = torch.randn(tensor.shape, generator=generator).to(tensor)
                    tensors[name] = tensor + noise * (tensor.std() if tensor.numel() > 1 else 1.0) + 0.1 * noise
            x = (torch.randn(*shape, features, generator=generator) * size).to(tensors["weight"])
            found = call_with(module, tensors, (x,), {})
            matrix = tensors["weight"] if transposed else tensors["weight"].t()
            expected = x @ matrix + (tensors["bias"] if bias is not None else 0.0)
            if not isinstance(found, Tensor) or found.shape != expected.shape:
                shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"for features of shape {tuple(x.shape)} it gave {shown}")
            largest = float(expected.abs().max()) or 1.0
            error = float((found.to(expected) - expected).abs().max()) / largest
            if not error <= torch.finfo(found.dtype).eps ** (1 - _DIGITS):
                worst = max(worst, error) if error == error else float("inf")
    return worst or None
