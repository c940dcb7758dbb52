"""Combining tensors of several tasks into one: task arithmetic, magnitude pruning, TIES and DARE.

Every rule is the same three steps: thin each tensor out, weight them, and add up or average what agrees in sign.

Papers: task arithmetic (Ilharco et al. 2023, arXiv:2212.04089), TIES (Yadav et al. 2023, arXiv:2306.01708), DARE
(Yu et al. 2024, arXiv:2311.03099). Names and signatures are those of ``peft.utils.merge_utils``.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from inlay.errors import CombinationError, ConfigError, InlayWarning, did_you_mean

__all__ = [
    "calculate_majority_sign_mask",
    "dare_linear",
    "dare_ties",
    "disjoint_merge",
    "magnitude_based_pruning",
    "magnitude_prune",
    "prune",
    "random_pruning",
    "reshape_weight_task_tensors",
    "task_arithmetic",
    "ties",
]

SignMethod = Literal["total", "frequency"]


# -- thinning out -----------------------------------------------------------------------------------------------------


def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
    """Keep the ``int(density * numel)`` entries of largest magnitude and set the others to zero.

    Args:
        tensor: any shape.
        density: share of entries to keep, 0 to 1.
    """
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel())).indices
    pruned = torch.zeros_like(flat)
    pruned[kept] = flat[kept]
    return pruned.reshape(tensor.shape)


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """Keep each entry with probability ``density``, drawn from torch's global stream, and set the others to zero.

    Args:
        tensor: any shape.
        density: probability of keeping an entry, 0 to 1.
        rescale: divide what is kept by ``density``, so that the expected value is the tensor itself.
    """
    pruned = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return pruned / density if rescale and density else pruned


def prune(tensor: Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False) -> Tensor:
    """Thin a tensor out by ``method``; see :func:`magnitude_based_pruning` and :func:`random_pruning`.

    A density of 1 or more returns the tensor itself, with a warning.

    Raises:
        ConfigError: a negative density, or a method that there is not.
    """
    if density >= 1:
        warnings.warn(f"density={density} keeps every entry, so nothing is pruned", InlayWarning, stacklevel=2)
        return tensor
    if density < 0:
        raise ConfigError(f"density: expected a share from 0 to 1, found {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale)
    hint = did_you_mean(str(method), ("magnitude", "random"))
    raise ConfigError(f"method: expected 'magnitude' or 'random', found {method!r}.{hint}")


# -- putting together -------------------------------------------------------------------------------------------------


def reshape_weight_task_tensors(task_tensors: Tensor, weights: Tensor) -> Tensor:
    """Return ``weights`` (tasks,) with an axis of one for each further axis of ``task_tensors`` (tasks, ...)."""
    return weights.reshape(*weights.shape, *[1] * (task_tensors.dim() - weights.dim()))


def calculate_majority_sign_mask(tensor: Tensor, method: SignMethod = "total") -> Tensor:
    """Return where each task has the sign that wins among the tasks; zeros never do.

    Args:
        tensor: (tasks, ...).
        method: ``total`` elects the sign of the sum, ``frequency`` the sign that more tasks have. Plus wins a tie.

    Raises:
        CombinationError: another method.
    """
    if method not in ("total", "frequency"):
        raise CombinationError(
            f"majority_sign_method: expected 'total' or 'frequency', found {method!r}."
            f"{did_you_mean(str(method), ('total', 'frequency'))}"
        )
    signs = tensor.sign()
    votes = (tensor if method == "total" else signs).sum(dim=0)
    return torch.where(votes < 0, signs < 0, signs > 0)


def disjoint_merge(task_tensors: Tensor, majority_sign_mask: Tensor) -> Tensor:
    """Return the mean over the tasks that the mask keeps, and zero where it keeps none.

    Args:
        task_tensors: (tasks, ...).
        majority_sign_mask: (tasks, ...), true for what is kept.
    """
    kept = majority_sign_mask.sum(dim=0).clamp(min=1.0)
    return (task_tensors * majority_sign_mask).sum(dim=0) / kept


def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
    """Return the weighted sum of tensors of one shape; ``weights`` is (tasks,)."""
    return _weighted(torch.stack(task_tensors), weights).sum(dim=0)


def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return the weighted sum of what magnitude pruning leaves of each tensor."""
    return task_arithmetic([prune(tensor, density, "magnitude") for tensor in task_tensors], weights)


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """Return the weighted sum of tensors that lost entries at random and were scaled up for it (DARE)."""
    return task_arithmetic([prune(tensor, density, "random", rescale=True) for tensor in task_tensors], weights)


def ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """Trim by magnitude, elect a sign for each entry, and average the weighted tasks that have it (TIES).

    Args:
        task_tensors: tensors of one shape.
        weights: (tasks,), applied after the election.
        density: share of entries that trimming keeps, 0 to 1.
        majority_sign_method: see :func:`calculate_majority_sign_mask`.
    """
    return _agreeing([prune(tensor, density, "magnitude") for tensor in task_tensors], weights, majority_sign_method)


def dare_ties(
    task_tensors: list[Tensor], weights: Tensor, density: float, majority_sign_method: SignMethod = "total"
) -> Tensor:
    """What :func:`ties` does, with DARE's random pruning instead of trimming."""
    thinned = [prune(tensor, density, "random", rescale=True) for tensor in task_tensors]
    return _agreeing(thinned, weights, majority_sign_method)


def _weighted(stacked: Tensor, weights: Tensor) -> Tensor:
    return stacked * reshape_weight_task_tensors(stacked, weights)


def _agreeing(task_tensors: list[Tensor], weights: Tensor, method: SignMethod) -> Tensor:
    stacked = torch.stack(task_tensors)
    return disjoint_merge(_weighted(stacked, weights), calculate_majority_sign_mask(stacked, method))
