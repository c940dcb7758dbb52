"""The ways of combining adapters by their names, and what each of them needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.combine import tensors
from inlay.core.dtype import merge_dtype
from inlay.errors import CombinationError, ConfigError, ConfigTypeError, did_you_mean

__all__ = ["COMBINATION_TYPES", "Request", "Rule", "rule"]

_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "linear": tensors.task_arithmetic,
    "magnitude_prune": tensors.magnitude_prune,
    "ties": tensors.ties,
    "dare_linear": tensors.dare_linear,
    "dare_ties": tensors.dare_ties,
}
COMBINATION_TYPES = ("svd", "cat", *_OPERATORS, *(f"{name}_svd" for name in _OPERATORS if name != "linear"))


@dataclass(frozen=True)
class Rule:
    """One way of combining updates.

    Attributes:
        name: as users write it.
        space: where it works: ``cat`` puts factors side by side, ``factors`` combines A with A and B with B,
            ``matrix`` combines whole updates, which singular value decomposition then makes low-rank again.
        operator: combines tensors of one shape, by weights.
        keywords: the operator's own numbers.
    """

    name: str
    space: str
    operator: Callable[..., Tensor]
    keywords: dict[str, Any]

    @property
    def sums(self) -> bool:
        """Whether the result is the plain weighted sum."""
        return self.operator is tensors.task_arithmetic

    def merge(self, found: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Combine tensors of one shape, in float32 or wider."""
        dtype = merge_dtype(found[0].dtype)
        wide = [tensor.to(dtype) for tensor in found]
        return self.operator(wide, torch.tensor(weights, dtype=dtype, device=wide[0].device), **self.keywords)


@dataclass(frozen=True)
class Request:
    """What is to be combined, and how.

    Attributes:
        adapters, weights: the adapters, each with its weight.
        name: the new adapter's name.
        rule: the way of combining.
        rank: of the result, for rules on whole matrices; by default the largest of the adapters.
        clamp: quantile that bounds the factors after the decomposition.
        driver: cuSOLVER's method of decomposition.
    """

    adapters: Sequence[str]
    weights: Sequence[float]
    name: str
    rule: Rule
    rank: int | None = None
    clamp: float | None = None
    driver: str | None = None


def rule(combination_type: str, density: float | None, majority_sign_method: str) -> Rule:
    """Return the rule of a name.

    Raises:
        CombinationError: an unknown name, or an unknown ``majority_sign_method`` where it is used.
        ConfigTypeError: no density where one is needed.
        ConfigError: a density below 0.
    """
    if combination_type not in COMBINATION_TYPES:
        raise CombinationError(
            f"combination_type: expected one of {', '.join(COMBINATION_TYPES)}; found {combination_type!r}."
            f"{did_you_mean(str(combination_type), COMBINATION_TYPES)}"
        )
    if combination_type in ("svd", "cat", "linear"):
        space = {"svd": "matrix", "cat": "cat", "linear": "factors"}[combination_type]
        return Rule(combination_type, space, tensors.task_arithmetic, {})
    operator = combination_type.removesuffix("_svd")
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise ConfigTypeError(
            f"density: expected a share from 0 to 1, which {combination_type!r} needs, found {density!r}"
        )
    if not density >= 0:
        raise ConfigError(f"density: expected a share from 0 to 1, found {density}")
    keywords: dict[str, Any] = {"density": density}
    if operator in ("ties", "dare_ties"):
        if majority_sign_method not in ("total", "frequency"):
            raise CombinationError(
                f"majority_sign_method: expected 'total' or 'frequency', found {majority_sign_method!r}"
            )
        keywords["majority_sign_method"] = majority_sign_method
    space = "matrix" if combination_type.endswith("_svd") else "factors"
    return Rule(combination_type, space, _OPERATORS[operator], keywords)
