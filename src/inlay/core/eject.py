"""Taking adapters out again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from inlay.core.hanging import dismount, drop_shared
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.core.readers import restore_readers
from inlay.core.shared import register_shared, unregister_shared
from inlay.core.state import State
from inlay.core.targets import base_parameters, places
from inlay.errors import MergeError
from inlay.parallel.fsdp import refuse_shell, settle
from inlay.parallel.hooks import lower
from inlay.parallel.tensors import scatter

__all__ = ["delete", "eject", "restore_grad"]


def delete(model: nn.Module, state: State, name: str) -> None:
    """Remove one adapter; layers that end without any are taken out too, and base biases that it trained are put back.

    Raises:
        UnknownAdapterError: there is no such adapter.
        MergeError: it is merged.
    """
    state.record(name)
    for layer in state.layers():
        if name in layer._merged:
            raise MergeError(f"adapter {name!r} is merged into {layer.site.name!r}; unmerge it before deleting it")
    for layer in list(state.layers()):
        if isinstance(layer, ModuleCopies):
            layer.modules_to_save._modules.pop(name, None)
        else:
            dismount(layer, name)
    _take_out_empty(model, state)
    restore_readers(model)
    if len(state.records) == 1:
        _end_replication(model, state)
    record = state.records.pop(name)
    drop_shared(state, record.shared, name)
    register_shared(model, state)
    _put_back(model, state, record.biases)
    state.active = tuple(active for active in state.active if active != name)
    state.touch()


@torch.no_grad()
def _put_back(model: nn.Module, state: State, names: Iterable[str]) -> None:
    """Give base parameters the values that they had, and freeze them as the rest of the base is."""
    named = base_parameters(model)
    for name in names:
        value = state.base_values.pop(name, None)
        if value is not None and name in named:
            named[name].copy_(scatter(value, named[name]))
            named[name].requires_grad_(False)


def _take_out_empty(model: nn.Module, state: State) -> None:
    """Put the original module back where no adapter is left."""
    for place in places(model):
        if isinstance(place.module, AdaptedLayer) and not place.module.entries:
            refuse_shell(place.path, place.module)
            original = _lowered(place.module, restore=False)
        elif isinstance(place.module, ModuleCopies) and not place.module.modules_to_save._modules:
            original = place.module.original_module
        else:
            continue
        for parent, name in place.parents:
            setattr(parent, name, original)
        state.leave(place.module)


def eject(model: nn.Module, state: State, *, restore: bool = True) -> nn.Module:
    """Take every adapter out: the original modules stand where they stood.

    Args:
        restore: also give back what training changed in the base (biases); False keeps it, as after a merge.
    """
    everything = places(model)
    for place in everything:
        if isinstance(place.module, AdaptedLayer):
            refuse_shell(place.path, place.module)
    settle()
    for place in everything:
        if isinstance(place.module, AdaptedLayer):
            original = _lowered(place.module, restore)
        elif isinstance(place.module, ModuleCopies):
            original = place.module.original_module if restore else place.module.current()
        else:
            continue
        for parent, name in place.parents:
            setattr(parent, name, original)
    restore_readers(model)
    _end_replication(model, state)
    restore_grad(model, state.base_grad)
    if restore and state.base_values:
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state.base_values.items():
                named[name].copy_(scatter(value, named[name]))
    state.records.clear()
    state.active = ()
    unregister_shared(model, state)
    state.shared._modules.clear()
    state.base_values.clear()
    state._layers.clear()
    state.touch()
    return model


def _end_replication(model: nn.Module, state: State) -> None:
    if state.replication is not None:
        state.replication.restore(model)
        state.replication = None


def _lowered(layer: AdaptedLayer, restore: bool) -> nn.Module:
    """Return the base layer, with what tensor parallelism hangs on it, and unmerged if it is to be restored."""
    if restore:
        layer.restore()
    below = layer.base_layer
    lower(layer, below)
    return _lowered(below, restore) if isinstance(below, AdaptedLayer) else below


def restore_grad(model: nn.Module, before: dict[str, bool]) -> None:
    """Give the base parameters the ``requires_grad`` that they had."""
    for name, parameter in base_parameters(model).items():
        flag = before.get(name)
        if flag is not None:
            parameter.requires_grad_(flag)
