"""What a model's root module carries while the model has adapters.

The state, and the configurations by adapter name (``peft_config``, where integrations look for it). Tensors that
several layers share are registered by the core: at the bare model, or at ``base_model`` of the wrapper around it, which
gives them the names that PEFT gives them.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from inlay.core.call import Call, opened
from inlay.core.state import BASE, Record, State, find_state
from inlay.errors import RoutingError, StateError, UnknownAdapterError, did_you_mean

__all__ = ["Configs", "call", "checked_names", "mark", "state_of", "unmark"]


class Configs(dict[str, Any]):
    """Configurations by adapter name; assigning to a name changes what will be saved for that adapter."""

    def __init__(self, records: dict[str, Record]) -> None:
        super().__init__({name: record.config for name, record in records.items()})
        self._records = records

    def __setitem__(self, name: str, config: Any) -> None:
        records = self.__dict__.get("_records")  # absent while a copy is being rebuilt
        if records is not None:
            if name not in records:
                raise StateError(f"no adapter {name!r} to give a configuration to; add it with add_adapter")
            records[name].config = config
        super().__setitem__(name, config)

    def refresh(self) -> None:
        """Follow what was added and deleted."""
        self.clear()
        self.update({name: record.config for name, record in self._records.items()})


def mark(root: nn.Module, state: State) -> None:
    """Make a bare model carry its state and configurations, as they are now."""
    if not state.records:
        unmark(root)
        return
    root.__dict__["_state"] = state
    held = root.__dict__.get("peft_config")
    if isinstance(held, Configs) and held._records is state.records:
        held.refresh()
    else:
        root.__dict__["peft_config"] = Configs(state.records)


def unmark(root: nn.Module) -> None:
    """Take off what :func:`mark` put on."""
    root.__dict__.pop("_state", None)
    if isinstance(root.__dict__.get("peft_config"), Configs):
        del root.__dict__["peft_config"]


def state_of(model: nn.Module) -> State:
    """Return the state of a model that has adapters.

    Raises:
        StateError: it has none.
    """
    state = find_state(model)
    if state is None:
        raise StateError(f"this {type(model).__name__} has no adapters")
    return state


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
    model: nn.Module, adapters: Iterable[str] | None = None, *, disabled: bool | None = None
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

    Raises:
        StateError: the model has no adapters.
        RoutingError: ``adapters`` is not a list of names.
        UnknownAdapterError: a name that the model does not have.
    """
    state = state_of(model)
    names = None if adapters is None else checked_names(state, adapters)
    return opened(state, names=names, disabled=disabled)
