"""Adapters by sample: who asks for whom, and how many rows a sample has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn

from inlay.core.call import Call, opened
from inlay.core.state import BASE, State
from inlay.errors import RoutingError, UnknownAdapterError, did_you_mean
from inlay.models.root import state_of

__all__ = ["batch_size", "call", "checked_names", "routed", "rows_per_prompt"]


def checked_names(state: State, names: Iterable[str], rows: int | None = None) -> tuple[str, ...]:
    """Return adapter names by sample as a tuple.

    Args:
        state: whose adapters they are; ``__base__`` stands for none.
        names: one per sample.
        rows: the batch size, where it is known.

    Raises:
        RoutingError: not a list of names, or not one per sample.
        UnknownAdapterError: a name that the model does not have.
    """
    if isinstance(names, str):
        raise RoutingError(f"adapter names by sample must be a list with one name per sample, found {names!r}")
    wanted = tuple(names)
    for name in dict.fromkeys(wanted):
        if name != BASE and name not in state.records:
            known = ", ".join(map(repr, (*state.records, BASE)))
            raise UnknownAdapterError(
                f"no adapter {name!r} to run a sample with; there are: {known}.{did_you_mean(str(name), state.records)}"
            )
    if not wanted or (rows is not None and len(wanted) != rows):
        raise RoutingError(f"{len(wanted)} adapter names were given for a batch of {rows} samples: give one per sample")
    return wanted


def call(
    model: nn.Module,
    adapters: Iterable[str] | None = None,
    *,
    disabled: bool | None = None,
    task_ids: Tensor | None = None,
) -> AbstractContextManager[Call]:
    """Choose adapters for the forwards that this thread runs inside the ``with`` block.

    ::

        with inlay.call(model, adapters=["french", "__base__", "german"]):
            model(batch_of_three)

    The choice also holds for the backward pass of these forwards, where gradient checkpointing recomputes them.

    Args:
        model: a model with adapters, bare or wrapped.
        adapters: the adapter of each sample of the batch, in order; ``__base__`` for none. None leaves the active
            ones on.
        disabled: True runs every sample without adapters.
        task_ids: (samples,) the task of each sample, for methods that choose by it (Poly).

    Raises:
        StateError: the model has no adapters.
        RoutingError: ``adapters`` is not a list of names.
        UnknownAdapterError: a name that the model does not have.
    """
    state = state_of(model)
    if adapters is None or state.residency is None:
        names = None if adapters is None else checked_names(state, adapters)
        return opened(state, names=names, disabled=disabled, tasks=task_ids)
    return routed(state, adapters, disabled=disabled, tasks=task_ids)


@contextmanager
def routed(
    state: State,
    names: Iterable[str],
    *,
    rows: int | None = None,
    expand: int = 1,
    disabled: bool | None = None,
    tasks: Tensor | None = None,
) -> Iterator[Call]:
    """Open a call with an adapter for each sample; registered ones are in the model for as long as it is open.

    Raises:
        what :func:`checked_names` raises.
    """
    if isinstance(names, str):
        checked_names(state, names)
    with (
        state.placed(list(names)) as held,
        opened(state, names=checked_names(state, held, rows), disabled=disabled, expand=expand, tasks=tasks) as running,
    ):
        yield running


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return the number of samples of a forward, where a tensor tells."""
    for value in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("inputs"), *args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


def rows_per_prompt(base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many rows of a batch generation makes of each prompt: beams, or returned sequences."""
    config = kwargs.get("generation_config") or getattr(base, "generation_config", None)

    def number(name: str) -> int:
        value = kwargs.get(name)
        return int(value if value is not None else getattr(config, name, None) or 1)

    return max(number("num_beams"), number("num_return_sequences"))
