"""Updates multiplied into the input of a transposed convolution, without making their weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.core.affine import Delta, LowRank, Site
from inlay.kernels.table import fast_path

__all__ = ["Geometry"]

_TRANSPOSED = (
    torch.nn.functional.conv_transpose1d,
    torch.nn.functional.conv_transpose2d,
    torch.nn.functional.conv_transpose3d,
)
_CONVS = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)


class Geometry:
    """How one call of a transposed convolution lays out its output.

    Args:
        module: the layer.
        x: its input.
        size: the ``output_size`` that the caller asked for, with or without batch and channel axes.

    Raises:
        ValueError: the layer cannot give that size.
    """

    def __init__(self, module: Any, x: Tensor, size: Sequence[int]) -> None:
        self.stride = module.stride
        self.padding = module.padding
        self.dilation = module.dilation
        axes = len(module.kernel_size)
        self.output_padding = module._output_padding(
            x, list(size), module.stride, module.padding, module.kernel_size, axes, module.dilation
        )

    @staticmethod
    def spread(module: Any, site: Site, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        """Run a transposed convolution with a layer's geometry, or a call's, and another weight.

        Args:
            module: the layer, or a :class:`Geometry`.
            weight: (in, out / groups, *kernel).
        """
        run = _TRANSPOSED[len(site.kernel) - 1]
        return run(x, weight, bias, module.stride, module.padding, module.output_padding, groups, module.dilation)


def down(module: Any, site: Site, x: Tensor, A: Tensor, crossing: bool = False) -> Tensor:
    """Take an input down to the rank of A.

    Args:
        x: (samples, in, *places), or without the axis of samples where A is one matrix.
        A: (r, fan_in), which every group of inputs is read through, or, ``crossing``, (r, fan_in of all groups); or
            (samples, r, fan_in).

    Returns:
        (..., groups * r, *places), or (..., r, *places) where A reads all groups; samples are side by side, as
        (1, samples * groups * r, *places), where each has an A.
    """
    groups = 1 if crossing else site.groups
    weight = A.unflatten(-1, (-1, *site.kernel)).transpose(-2 - len(site.kernel), -1 - len(site.kernel))
    if A.dim() == 3:
        x = x.reshape(1, -1, *x.shape[2:])
        weight = weight.unsqueeze(1).expand(-1, groups, *weight.shape[1:]).flatten(0, 2)
        groups *= len(A)
    elif groups > 1:
        weight = weight.repeat(groups, *([1] * (weight.dim() - 1)))
    return Geometry.spread(module, site, x, weight, None, groups)


@fast_path(LowRank, "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _low_rank(module: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    """A transposed convolution down to the rank, then one of 1x1 (per group) up to the outputs."""
    assert isinstance(delta, LowRank)
    t = down(module, site, x.to(delta.A.dtype), delta.A, delta.groups > 1)
    up = delta.B.reshape(*delta.B.shape, *([1] * len(site.kernel)))
    return _CONVS[len(site.kernel) - 1](t, up, None, groups=site.groups)
