"""``peft.tuners.shira.mask_functions``: masks that choose which entries of a weight SHiRA trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["random_mask"]


def random_mask(base_layer: nn.Module, r: int, random_seed: int | None = None, **kwargs: Any) -> Tensor:
    """Choose r * (out + in) entries of a weight at random; PEFT chooses the same ones for a seed.

    Args:
        base_layer: holds ``weight``, a matrix (out, in).
        r: the number of entries is that of a low-rank update of this rank.
        random_seed: what the entries are drawn from.
        kwargs: taken and not read, as in PEFT.

    Returns:
        A mask of the weight's shape, on its device, True at the chosen entries.
    """
    weight: Tensor = base_layer.weight  # type: ignore[assignment]  # not any module has one; these do
    size = weight.numel()
    generator = torch.Generator()  # without a seed it has one of torch's, so that nothing is left to chance
    if random_seed is not None:
        generator.manual_seed(random_seed)
    chosen = torch.randperm(size, generator=generator)[: r * sum(weight.shape)].to(weight.device)
    return weight.new_zeros(size, dtype=torch.bool).index_fill_(0, chosen, True).view(weight.shape)
