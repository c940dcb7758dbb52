"""Updates of embedding bags: rows are summed or averaged in the space of the rank, or only those of the tokens at hand.

Both reductions are linear in the table, so what an update adds to a bag is the bag of what it adds to its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Columns, Delta, LowRank, Site
from inlay.core.reading import Modulated
from inlay.core.structured import BlockLowRank, Circulant, Hadamard, Kron, Repeated, Sparse
from inlay.kernels.table import FAST, fast_path

__all__ = ["Bags", "pool"]

NAME = "embedding_bag"


class Bags:
    """One call of an embedding bag.

    Attributes:
        module: the layer.
        offsets: (bags,) where each bag starts, None where every row of the input is a bag.
        weights: what each token counts, None for 1.
        samples: a tensor that has one row for each bag.
        embed_scale: bags are never scaled.
    """

    embed_scale = 1.0

    def __init__(self, module: Any, x: Tensor, offsets: Tensor | None, weights: Tensor | None) -> None:
        self.module = module
        self.offsets = offsets
        self.weights = weights
        self.samples = x if offsets is None else offsets[:-1] if module.include_last_offset else offsets
        self.padding_idx = module.padding_idx
        self.scale_grad_by_freq = module.scale_grad_by_freq


def pool(bags: Bags, x: Tensor, table: Tensor, padding: int | None = None) -> Tensor:
    """Reduce rows of a table.

    Args:
        x: numbers of rows, as the layer received them.
        table: (rows, n).
        padding: the row that counts as none.

    Returns:
        (bags, n).
    """
    module = bags.module
    return torch.nn.functional.embedding_bag(
        x,
        table,
        bags.offsets,
        scale_grad_by_freq=bags.scale_grad_by_freq,
        mode=module.mode,
        per_sample_weights=None if bags.weights is None else bags.weights.to(table.dtype),
        include_last_offset=module.include_last_offset,
        padding_idx=padding,
    )


def down(bags: Bags, x: Tensor, A: Tensor) -> Tensor:
    """Take bags down to the rank of A, (r, vocabulary) or (bags, r, vocabulary); returns (bags, r)."""
    if A.dim() == 2:
        return pool(bags, x, A.t(), bags.padding_idx)
    count, r, size = A.shape
    if bags.offsets is None:
        bag = torch.arange(count, device=x.device).unsqueeze(1)
    else:
        place = torch.arange(x.numel(), device=x.device, dtype=bags.samples.dtype)
        bag = torch.searchsorted(bags.samples.contiguous(), place, right=True) - 1
    rows = x + bag * size
    if bags.padding_idx is not None:  # of all tables, the first one's row stands for padding
        rows = torch.where(x == bags.padding_idx, bags.padding_idx, rows)
    return pool(bags, rows, A.mT.reshape(count * size, r), bags.padding_idx)


@fast_path(LowRank, NAME)
def _low_rank(bags: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
    assert isinstance(delta, LowRank)
    return torch.nn.functional.linear(down(bags, x, delta.A), delta.B)


def _by_rows(operator: type[Delta]) -> None:
    """Let an operator make its rows of the tokens at hand as it does for an embedding, and reduce those."""
    rows_of: Callable[..., Tensor] = FAST["embedding", operator]

    @fast_path(operator, NAME)
    def rows_in_bags(bags: Any, site: Site, x: Tensor, delta: Delta) -> Tensor:
        if bags.scale_grad_by_freq:  # gradients by a token's frequency belong to the rows of the whole table
            return pool(bags, x, (delta.dense() / delta.scale).t(), bags.padding_idx)
        rows = rows_of(bags, site, x.reshape(-1), delta)
        place = torch.arange(x.numel(), device=x.device, dtype=x.dtype).view(x.shape)
        if bags.padding_idx is None:
            return pool(bags, place, rows)
        place = torch.where(x == bags.padding_idx, x.numel(), place)
        return pool(bags, place, nn.functional.pad(rows, (0, 0, 0, 1)), x.numel())


for _operator in (Hadamard, Modulated, Columns, Kron, Circulant, BlockLowRank, Repeated, Sparse):
    _by_rows(_operator)
