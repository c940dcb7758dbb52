"""Main directions of a weight, groups of rows that lie alike in them, and which groups train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.core.clusters import cluster
from inlay.core.lifecycle import Stepped
from inlay.core.method import P

__all__ = ["allocate", "main_directions", "row_groups"]

SEED = 123456789  # of the clusters; PEFT's, whose files do not say which row is in which group


def main_directions(matrix: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return U (rows, r) and V^T (r, columns) of the r largest singular values, approximately and as the seed says."""
    r = min(r, *matrix.shape)
    devices = [] if matrix.device.type == "cpu" else [matrix.device]
    with torch.random.fork_rng(devices=devices, device_type=matrix.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        U, _, V = torch.svd_lowrank(matrix.float(), q=r, niter=2)
    return U[:, :r], V[:, :r].mT


def row_groups(points: Tensor, count: int) -> list[Tensor]:
    """Return the rows of each cluster of (n, r) points."""
    labels = _sorted_by_sklearn(points, count) if len(points) <= points.shape[1] else None
    if labels is None:
        labels = cluster(points, count, 10, SEED)
    return [(labels == i).nonzero().flatten() for i in range(int(labels.max()) + 1)]


def _sorted_by_sklearn(points: Tensor, count: int) -> Tensor | None:
    """Rows of a square orthogonal matrix are equally far from each other, so that clusters hang on rounding alone.

    To read PEFT's files of such layers, its own rounding is needed: scikit-learn's, where it is installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        return None
    made = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=SEED)
    return torch.from_numpy(made.fit_predict(points.detach().cpu().float().numpy())).long()


def allocate(adapter: Stepped, config: Any, step: int) -> None:
    """Follow how important each group is, and switch gradients of the least important groups off (ASA).

    Args:
        adapter: its groups have tensors ``A0``, ``B0``, ``A1``, ...
        config: an ``AdamssConfig``.
        step: the training step.
    """
    if not config.init_warmup <= step <= config.final_warmup:
        return
    groups = [
        (f"{site.name} {i}", getattr(p, f"A{i}"), getattr(p, f"B{i}"))
        for site, p in adapter.layers
        for i in range(_count(p))
    ]
    for key, A, B in groups:
        for part, tensor in ((f"{key} A", A), (f"{key} B", B)):
            if tensor.grad is not None:
                zero = (torch.zeros_like(tensor), torch.zeros_like(tensor))
                mean, unsure = adapter.memory.setdefault(part, zero)
                now = (tensor * tensor.grad).abs()
                unsure.lerp_((now - mean).abs(), 1 - config.asa_uncertainty_beta)
                mean.lerp_(now, 1 - config.asa_importance_beta)
    if step % config.mask_interval:
        return
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    target = config.asa_target_subspaces
    wanted = int(target + (len(groups) - target) * left**config.asa_schedule_exponent)
    memory = adapter.memory
    judged = [group for group in groups if f"{group[0]} A" in memory and f"{group[0]} B" in memory]
    scores = [
        sum(float((mean * unsure).mean()) for mean, unsure in (memory[f"{key} A"], memory[f"{key} B"]))
        for key, _, _ in judged
    ]
    best = sorted(range(len(judged)), key=scores.__getitem__, reverse=True)[: max(0, wanted)]
    for i, (_, *tensors) in enumerate(judged):
        for tensor in tensors:
            tensor.requires_grad_(i in best)
            if i not in best:
                tensor.grad = None
    memory.clear()


def _count(p: P) -> int:
    i = 0
    while p.get(f"A{i}") is not None:
        i += 1
    return i
