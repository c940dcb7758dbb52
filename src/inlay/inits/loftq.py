"""LoftQ: start from what quantising the weight loses (Li et al. 2023, arXiv:2310.08659)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from inlay.config.starts import LoftQConfig
from inlay.inits.decompose import leading
from inlay.inits.start import Factors, Given, Leading

__all__ = ["LoftQ", "nf4_levels", "rounded", "split"]

_BLOCK = 64  # numbers that share one scale, as QLoRA has them


class LoftQ(Leading):
    """The base is Q = quantised(W - s B A) and ``s B A`` the best approximation of W - Q of rank r, in turns.

    The base then holds numbers that a quantiser of the same form reproduces, and the adapter makes up for its error as
    far as its rank goes.
    """

    identity = False

    def factors(self, given: Given) -> Factors:
        options = LoftQConfig(**given.config.loftq_config)
        turned = given.site.transposed or given.site.lookup
        weight = given.weight.mT if turned else given.weight  # blocks run along the weight as it is stored
        base, left, values, right = split(weight, given.r, options.loftq_bits, options.loftq_iter)
        if turned:
            base, left, right = base.mT, right.mT, left.mT
        made = given.scaled(left, values, right)
        return Factors(made.A, made.B, base)


def split(weight: Tensor, r: int, bits: int, rounds: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the quantised weight and the r leading singular triplets of what it lacks.

    Args:
        weight: (*, m, n).
        bits: 4 or 8.
        rounds: how often quantising and decomposing alternate.
    """
    update = torch.zeros_like(weight)
    for _ in range(rounds):
        base = rounded(weight - update, bits)
        left, values, right = leading(weight - base, r)
        update = (left * values.unsqueeze(-2)) @ right
    return base, left, values, right


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return the numbers that a quantised weight stands for.

    4 bits: NF4 (Dettmers et al. 2023, arXiv:2305.14314), 64 numbers in a row sharing one scale. 8 bits: integers from
    -127 to 127, each row having a scale.
    """
    if bits == 8:
        scale = weight.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        return (weight / scale).round() * scale
    flat = weight.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    levels = torch.tensor(nf4_levels(), dtype=weight.dtype, device=weight.device)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).view(-1)[: flat.numel()].view(weight.shape)


@cache
def nf4_levels() -> tuple[float, ...]:
    """Return the 16 values of the 4-bit normal float, ascending from -1 to 1.

    They are quantiles of the normal distribution, 7 below zero, zero itself and 8 above, with the outermost
    probability halfway between those that 15 and 16 even bins would leave outside, divided by the largest.
    """
    outer = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(outer, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(outer, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above[0]
    return tuple(values.tolist())
