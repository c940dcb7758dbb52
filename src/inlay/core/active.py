"""Which adapters are on, and which train."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager

from torch import nn

from inlay.core.entry import find_tensor
from inlay.core.gradients import reach_of, train_everywhere
from inlay.core.state import State
from inlay.errors import StateError, TargetError, UnsupportedError

__all__ = ["adapter_parameters", "set_active", "set_trainable", "switch_training", "switched_back", "the_one"]


def _parameters(state: State, names: Iterable[str]) -> Iterator[tuple[nn.Parameter, bool]]:
    """Iterate over the parameters of adapters, full copies included, with whether each may train."""
    names = list(names)
    for layer in state.layers():
        for name in names:
            yield from layer.parameters_of(name)
    yield from _shared(state, names)


def _shared(state: State, names: Iterable[str]) -> Iterator[tuple[nn.Parameter, bool]]:
    for name in names:
        for slot in state.records[name].shared.values():
            tensor = find_tensor(state.shared, name, *slot.place)
            if isinstance(tensor, nn.Parameter):
                yield tensor, slot.trainable


def adapter_parameters(state: State, names: Iterable[str]) -> list[nn.Parameter]:
    """Return every parameter of the named adapters, full copies included."""
    return list({id(parameter): parameter for parameter, _ in _parameters(state, names)}.values())


def set_trainable(state: State, names: Iterable[str], trainable: bool = True) -> None:
    """Switch gradients of adapters on or off; slots that never train stay off."""
    switch_training(state, () if trainable else names, names if trainable else ())


def switch_training(state: State, off: Iterable[str], on: Iterable[str]) -> None:
    """Switch gradients of some adapters off, and then those of others on; slots that never train stay off."""
    wanted = [*((name, False) for name in off), *((name, True) for name in on)]
    for name, _ in wanted:
        state.record(name)
    for name, trainable in wanted:
        (state.training.add if trainable else state.training.discard)(name)
    for name, trainable in wanted:
        train_everywhere(state, name, trainable)
        for parameter, may_train in _shared(state, (name,)):
            if may_train and parameter.is_floating_point():
                parameter.requires_grad_(trainable)


@contextmanager
def switched_back(state: State) -> Iterator[None]:
    """If the block raises, let the model and each layer have the active adapters and switches that they had."""
    active, enabled = state.active, state.enabled
    own = [(layer, layer.__dict__["_own_active"], layer.__dict__["_own_enabled"]) for layer in state.apart()]
    try:
        yield
    except BaseException:
        state.active, state.enabled = active, enabled
        for layer in state.apart():
            layer.follow()
        for layer, its_active, its_enabled in own:
            layer.override(its_active, its_enabled)
        state.touch()
        raise


def _agree(state: State, wanted: tuple[str, ...]) -> None:
    """Let every layer refuse what cannot be active together; a single adapter that all agreed to is not asked about.

    Raises:
        UnsupportedError: a layer refuses.
    """
    known = reach_of(state, wanted[0]) if len(wanted) == 1 else None
    if known is not None and known.agreed:
        return
    for layer in state.layers():
        layer.check_active(wanted)
    if known is not None:
        known.agreed = True


def set_active(state: State, names: Iterable[str], trainable: bool | None = None) -> None:
    """Activate adapters, in this order; every layer follows.

    Args:
        trainable: whether the active ones get gradients and the others lose them; None leaves gradients alone.
    """
    wanted = tuple(names)
    for name in wanted:
        state.record(name)
    if len(set(wanted)) < len(wanted):
        raise StateError(f"an adapter can be active once only, found {list(wanted)}")
    _agree(state, wanted)
    if state.fixed is not None:
        state.fixed.check(state, wanted)
    with switched_back(state):
        state.active = wanted
        for layer in state.apart():
            layer.follow()
    state.touch()
    if trainable is not None:
        others = state.training_beside(wanted)
        switch_training(state, others if trainable else [*others, *wanted], wanted if trainable else ())


def the_one(asked: str | list[str], there: Container[str], only: str) -> str | None:
    """Return which of the adapters asked for is there, or None.

    Args:
        asked: a name, which is returned as it is, or names.
        there: the adapters that there are.
        only: place and sentence for the error.

    Raises:
        UnsupportedError: more than one is there.
        TargetError: no adapter was named.
    """
    if isinstance(asked, str):
        return asked
    if not asked:
        raise TargetError(f"{only}; name at least one adapter to activate")
    found = [name for name in asked if name in there]
    if len(found) > 1:
        raise UnsupportedError(f"{only}, found {', '.join(map(repr, found))}")
    return found[0] if found else None
