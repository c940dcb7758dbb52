"""Choosing what to adapt by condition numbers: layers whose weight is well conditioned come first (KappaTune).

The condition number is the ratio of the largest singular value to the smallest. A weight with a small one is far from
having specialised directions, so that changing it disturbs least what the model knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core import storage
from inlay.core.progress import shown
from inlay.core.targets import base_parameters, places

__all__ = ["KappaTuneSelector", "find_kappa_target_modules"]

EXPERT_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
_SMALLEST = 1e-8  # added to the smallest singular value, so that a singular weight has a number too


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return the share of linear layers and of expert banks with the smallest condition numbers.

    Args:
        model: the model, with or without adapters; only its base weights are looked at.
        top_p: the share, of each of the two.
        max_dim_size_to_analyze: weights with a longer side are left out, because decomposing them takes too long.
        moe_param_suffixes: endings of the names of expert banks: parameters of shape (experts, out, in). By default
            those of the transformers library.
        show_progress: show how far it is.

    Returns:
        Values for the fields ``target_modules`` and ``target_parameters`` of a configuration; None for the latter
        where the model has no such banks.
    """
    chosen = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": chosen.get_best_targets(top_p=top_p),
        "target_parameters": chosen.get_best_target_parameters(top_p=top_p) or None,
    }


class KappaTuneSelector:
    """The condition numbers of a model's weights, computed when they are first asked for.

    Args:
        model, max_dim_size_to_analyze, moe_param_suffixes, show_progress: see :func:`find_kappa_target_modules`.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = moe_param_suffixes or EXPERT_SUFFIXES
        self.show_progress = show_progress
        self._modules: dict[str, float] | None = None
        self._parameters: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return names of linear layers, the best conditioned first.

        Args:
            top_p: this share of them, at least one.
            num_modules: this many; goes before ``top_p``.
            threshold: those whose condition number is no larger; used where neither of the others is given.
        """
        if self._modules is None:
            self._modules = self._measured(self._linear_weights(), "linear layers")
        return _best(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return names of expert banks, by the mean condition number of their experts; see :meth:`get_best_targets`."""
        if self._parameters is None:
            self._parameters = self._measured(self._banks(), "expert banks")
        return _best(self._parameters, top_p, num_modules, threshold)

    def _bare(self) -> nn.Module:
        getter: Any = getattr(self.model, "get_base_model", None)
        return getter() if callable(getter) else self.model

    def _linear_weights(self) -> dict[str, Callable[[], Tensor]]:
        found: dict[str, Callable[[], Tensor]] = {}
        for place in places(self._bare()):
            if isinstance(place.base, nn.Linear):
                found[place.path] = lambda base=place.base: storage.read(base, "weight")  # type: ignore[misc]
        return found

    def _banks(self) -> dict[str, Callable[[], Tensor]]:
        return {
            name: lambda parameter=parameter: parameter.detach()  # type: ignore[misc]
            for name, parameter in base_parameters(self._bare()).items()
            if parameter.dim() == 3 and name.endswith(tuple(self.moe_param_suffixes))
        }

    def _measured(self, weights: Mapping[str, Callable[[], Tensor]], what: str) -> dict[str, float]:
        """Return the condition number of each weight that is not too large, the mean over its leading axis if any."""
        work = list(weights.items())
        pairs: Iterable[tuple[str, Callable[[], Tensor]]] = shown(
            work, f"Condition numbers of {what}", "weight", on=self.show_progress and bool(work)
        )
        found = {}
        for name, read in pairs:
            weight = read()
            if max(weight.shape[-2:]) <= self.max_dim_size_to_analyze:
                found[name] = condition_number(weight)
        return found


@torch.no_grad()
def condition_number(weight: Tensor) -> float:
    """Return the ratio of the largest to the smallest singular value, the mean over a bank's experts.

    Args:
        weight: (out, in) or (experts, out, in).
    """
    experts = weight.float().unsqueeze(0) if weight.dim() == 2 else weight
    numbers = []
    for expert in experts:  # one by one: a bank in float32 may not fit beside the model
        values = torch.linalg.svdvals(expert.float())
        numbers.append(float(values[0] / (values[-1] + _SMALLEST)))
    return sum(numbers) / len(numbers)


def _best(numbers: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    ordered = sorted(numbers, key=numbers.__getitem__)
    if count is not None:
        return ordered[:count]
    if top_p is not None:
        return ordered[: max(1, int(len(ordered) * top_p))]
    return [name for name in ordered if threshold is None or numbers[name] <= threshold]
