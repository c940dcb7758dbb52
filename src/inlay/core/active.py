"""Which adapters are on, and which train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from inlay.core.entry import find_tensor
from inlay.core.mount import ModuleCopies
from inlay.core.state import State
from inlay.errors import StateError

__all__ = ["adapter_parameters", "set_active", "set_trainable"]


def _parameters(state: State, names: Iterable[str]) -> Iterator[tuple[nn.Parameter, bool]]:
    """Iterate over the parameters of adapters, full copies included, with whether each may train."""
    names = list(names)
    for layer in state.layers():
        for name in names:
            if isinstance(layer, ModuleCopies):
                copy = layer.modules_to_save._modules.get(name)
                if copy is not None:
                    yield from ((parameter, True) for parameter in copy.parameters())
            else:
                for entry in layer.entries.get(name, ()):
                    yield from entry.parameters(layer)
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
    names = list(names)
    for name in names:
        state.record(name)
    for parameter, may_train in _parameters(state, names):
        if may_train and parameter.is_floating_point():
            parameter.requires_grad_(trainable)


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
    for layer in state.layers():
        layer.check_active(wanted)
    for layer in state.layers():
        layer.follow()
    state.active = wanted
    state.touch()
    if trainable is not None:
        set_trainable(state, [name for name in state.records if name not in wanted], False)
        set_trainable(state, wanted, trainable)
