"""Dropout of a layer's input from cheap random bits: one byte a mask element, or none where a seed gives it again.

``torch.nn.functional.dropout`` draws one number per element, which on a CPU costs as much as the base product of a
half-precision layer. Here 64 random bits serve eight elements, so the probability is a multiple of 1/256 (of 1/65536
where that would be far off), and the kept elements are scaled by the probability that was really drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Mask", "drawn_probability"]

# A probability may be off by this share of itself before two bytes are drawn for an element.
_TOLERANCE = 0.02


def drawn_probability(p: float) -> tuple[int, int]:
    """Return (number of levels dropped, number of levels) of the probability that stands for ``p`` in (0, 1)."""
    dropped = min(max(round(p * 256), 1), 255)
    if abs(dropped / 256 - p) <= _TOLERANCE * min(p, 1 - p):
        return dropped, 256
    return min(max(round(p * 65536), 1), 65535), 65536


class Mask:
    """Which elements of one input a dropout keeps.

    Args:
        x: the input, (*, in); floating.
        p: probability of dropping an element, in (0, 1).
        again: draw from a seed, so that :meth:`bits` can give the same elements later and none need be kept; by
            default on an accelerator, where drawing is cheaper than memory.

    Attributes:
        scale: what kept elements are multiplied by, 1 / (1 - p).
    """

    __slots__ = ("_bits", "_dropped", "_levels", "_seed", "device", "scale", "shape")

    def __init__(self, x: Tensor, p: float, again: bool | None = None) -> None:
        self.shape = x.shape
        self.device = x.device
        self._dropped, self._levels = drawn_probability(p)
        self.scale = self._levels / (self._levels - self._dropped)
        self._bits: Tensor | None = None
        self._seed: int | None = None
        capturing = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if (x.device.type not in ("cpu", "meta") if again is None else again) and not capturing:
            self._seed = int(torch.empty((), dtype=torch.int64).random_())
        else:
            self._bits = self._draw(None)

    @property
    def kept(self) -> Tensor | None:
        """The bits that have to be kept for backward, or None where :meth:`bits` can draw them again."""
        return self._bits

    def bits(self) -> Tensor:
        """Return 1 for a kept element and 0 for a dropped one, (*, in), uint8."""
        if self._bits is not None:
            return self._bits
        assert self._seed is not None
        return self._draw(torch.Generator(self.device).manual_seed(self._seed))

    def _draw(self, generator: torch.Generator | None) -> Tensor:
        count, size = self.shape.numel(), 1 if self._levels == 256 else 2
        words = torch.empty((count * size + 7) // 8, dtype=torch.int64, device=self.device)
        words.random_(-(2**63), None, generator=generator)
        if size == 1:
            levels, least = words.view(torch.uint8), self._dropped
        else:
            levels, least = words.view(torch.int16), self._dropped - 32768
        # a byte of 0 or 1 multiplies faster than a bool, which is converted first
        return (levels[:count] >= least).view(torch.uint8).view(self.shape)
