"""k-means as scikit-learn runs it with ``init="random"`` and one start, so that equal seeds give equal clusters."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["cluster"]


def cluster(points: Tensor, count: int, steps: int, seed: int) -> Tensor:
    """Sort points into clusters (Lloyd 1982).

    Args:
        points: (n, features).
        count: of clusters, at most n.
        steps: the largest number of iterations.
        seed: of the random choice of the first centres, as numpy's ``RandomState`` takes it.

    Returns:
        (n,) the number of each point's cluster.
    """
    x = points.detach().float().cpu()
    x = x - torch.from_numpy(x.numpy().mean(0))  # rounded as numpy rounds, which ties hang on
    n = len(x)
    chances = np.full(n, np.float32(1) / np.float32(n), dtype=np.float32)
    first = np.random.RandomState(seed).choice(n, size=count, replace=False, p=chances)
    centres = x[torch.from_numpy(np.asarray(first))]
    labels = torch.full((n,), -1)
    least = 1e-4 * float(x.var(0, unbiased=False).mean())
    for _ in range(steps):
        before, labels = labels, _nearest(x, centres)
        moved = _means(x, labels, centres)
        shift = float((moved - centres).square().sum())
        centres = moved
        if torch.equal(labels, before):
            return labels
        if shift <= least:
            break
    return _nearest(x, centres)


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    return (centres.square().sum(1) - 2 * (x @ centres.T)).argmin(1)


def _means(x: Tensor, labels: Tensor, centres: Tensor) -> Tensor:
    """Return the mean of each cluster; one without points gets the point that is farthest from its own centre."""
    sums = torch.zeros_like(centres).index_add(0, labels, x)
    sizes = torch.bincount(labels, minlength=len(centres)).to(x.dtype)
    empty = (sizes == 0).nonzero().flatten().tolist()
    if empty:
        far = (x - centres[labels]).square().sum(1).argsort(descending=True)
        for place, point in zip(empty, far.tolist(), strict=False):
            home = labels[point]
            sums[home] -= x[point]
            sizes[home] -= 1
            sums[place], sizes[place] = x[point], 1
    return sums * (1 / sizes).unsqueeze(1)
