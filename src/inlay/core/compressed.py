"""A low-rank update whose A is to get its gradient from compressed inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.affine import LowRank
from inlay.core.structured import Structured

__all__ = ["Compressed"]


class Compressed(Structured):
    """``B @ A`` as :class:`LowRank` has it; how it is multiplied is said in ``kernels.compressed``.

    Args:
        update: what it is.
        pieces: sub-tokens that the features of a token are cut into.
        strength: factor on A's gradient.
        direction: (features / pieces,) what sub-tokens are projected on, of length 1; None is that of their mean in
            each input.
        learns: while ``direction`` is zero, the mean of an input's sub-tokens is written there.
    """

    factors = ("A", "B")

    def __init__(
        self, update: LowRank, pieces: int, strength: float, direction: Tensor | None, learns: bool = False
    ) -> None:
        self.A, self.B, self.bias = update.A, update.B, update.bias
        self.groups, self.scale = update.groups, update.scale
        self.pieces = pieces
        self.strength = strength
        self.direction = direction
        self.learns = learns

    def plain(self, A: Tensor | None = None, B: Tensor | None = None) -> LowRank:
        """Return the update without its scale and bias, with other factors if any are given."""
        return LowRank(self.B if B is None else B, self.A if A is None else A, groups=self.groups)

    def matrix(self) -> Tensor:
        return self.plain().dense()

    def project(self, x: Tensor, channel: int) -> tuple[Tensor, Tensor]:
        """Return the numbers that are kept of an input, with as many channels as pieces, and the direction."""
        with torch.no_grad():  # not as a decorator, which cannot be traced on a method
            tokens = self.cut(x, channel)
            direction = self._found(tokens).to(x.dtype)
            return (tokens @ direction).movedim(-1, channel), direction

    def _found(self, tokens: Tensor) -> Tensor:
        """Return what to project sub-tokens on."""
        direction = self.direction
        if direction is None:
            return _mean(tokens)
        if not self.learns:
            return direction
        # no branch, which a compiled graph could not have
        found = torch.where(direction.any(), direction, _mean(tokens).to(direction.dtype))
        direction.copy_(found)
        return found

    def cut(self, x: Tensor, channel: int) -> Tensor:
        """Return sub-tokens, (..., pieces, features / pieces), with zeros after the last feature."""
        x = x.movedim(channel, -1)
        size = -(-x.shape[-1] // self.pieces)
        return torch.nn.functional.pad(x, (0, size * self.pieces - x.shape[-1])).unflatten(-1, (self.pieces, size))


def _mean(tokens: Tensor) -> Tensor:
    """Return the direction of the mean of sub-tokens (..., n), with length 1."""
    mean = tokens.flatten(0, -2).float().mean(0)
    norm = torch.linalg.vector_norm(mean)
    return torch.where(norm > 0, mean / norm, torch.full_like(mean, mean.numel() ** -0.5))
