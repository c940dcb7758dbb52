"""What methods do in training beside forward and backward: a term of the loss, and something after every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.errors import StateError

if TYPE_CHECKING:
    from inlay.core.affine import Site
    from inlay.core.method import P
    from inlay.core.state import State

__all__ = ["Stepped", "moving_importance", "penalises", "penalty_of", "step_of", "terms_of", "total"]


@dataclass
class Stepped:
    """An adapter after a training step.

    Attributes:
        config: what will be saved; a method may write to it.
        layers: sites with the adapter's tensors there, in the order of the model.
        memory: what the method keeps until the next step.
    """

    config: Any
    layers: list[tuple[Site, P]]
    memory: dict[str, Any] = field(default_factory=dict)


def _training(state: State, hook: str) -> Iterator[tuple[str, Any]]:
    """Iterate over the active adapters that train and whose method has something to do, with their records."""
    from inlay.core.method import Method

    if not state.enabled:
        return
    for name in state.active:
        record = state.records.get(name)
        if record is None or name not in state.training:
            continue
        if getattr(type(record.method), hook) is not getattr(Method, hook):
            yield name, record


def _layers(state: State, name: str, method: Any) -> list[tuple[Site, P]]:
    from inlay.core.layer import AdaptedLayer
    from inlay.core.sliced import own_method, own_site

    return [
        (own_site(entry.method, entry.site), layer.params(entry))
        for layer in state.layers()
        if isinstance(layer, AdaptedLayer)
        for entry in layer.entries.get(name, ())
        if own_method(entry.method) is method and entry.home is None
    ]


def penalises(method: Any) -> bool:
    """Whether a method has a term of the loss."""
    from inlay.core.method import Method

    return type(method).penalty is not Method.penalty


def penalty_of(state: State, within: bool = False) -> Tensor | None:
    """Return the sum of the terms that active adapters in training add to the loss; None where there is none.

    Args:
        within: only of methods whose terms a model of this policy adds to its own loss.
    """
    every = state.policy.adds_every_term or not within
    return total(
        term
        for name, record in _training(state, "penalty")
        if every or record.method.adds_penalty
        if (term := record.method.penalty(_layers(state, name, record.method))) is not None
    )


def terms_of(state: State, function: str, names: Iterable[str] | None = None) -> list[Tensor]:
    """Return what a function of their methods gives for the layers of some adapters, by default the active ones.

    Args:
        function: of those methods that have it: takes sites with tensors and returns a term for each.
    """
    found: list[Tensor] = []
    for name in state.active if names is None else names:
        method = state.records[name].method if name in state.records else None
        if hasattr(method, function):
            found.extend(getattr(method, function)(_layers(state, name, method)))
    return found


def total(terms: Iterable[Tensor]) -> Tensor | None:
    """Return the sum of numbers, on the device of the first; None of none."""
    found: Tensor | None = None
    for term in terms:
        found = term if found is None else found + term.to(found.device)
    return found


@torch.no_grad()
def step_of(state: State, global_step: int) -> None:
    """Let the methods of active adapters in training do what they do after a step of the optimiser."""
    for name, record in _training(state, "step"):
        adapter = Stepped(record.config, _layers(state, name, record.method), record.memory)
        record.method.step(adapter, global_step)


def moving_importance(
    memory: dict[str, Any], key: str, tensors: Sequence[Tensor], beta1: float, beta2: float
) -> Iterable[tuple[Tensor, Tensor]]:
    """Follow how much the loss depends on each number of some tensors (equations 6 and 7 of arXiv:2303.10512).

    Args:
        memory: where moving means are kept.
        key: of these tensors there.
        tensors: parameters with gradients.
        beta1, beta2: decay of the means of ``|w * grad|`` and of its distance from its own mean.

    Returns:
        Both means for each tensor.

    Raises:
        StateError: no tensor has a gradient.
    """
    if all(tensor.grad is None for tensor in tensors):
        raise StateError(
            f"{key!r} has no gradients: this step is for after loss.backward() and before optimizer.zero_grad()"
        )
    if key not in memory:
        memory[key] = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in tensors]
    for tensor, (mean, unsure) in zip(tensors, memory[key], strict=True):
        now = torch.zeros_like(tensor) if tensor.grad is None else (tensor * tensor.grad).abs()
        mean.mul_(beta1).add_(now, alpha=1 - beta1)
        unsure.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)
    found: list[tuple[Tensor, Tensor]] = memory[key]
    return found
