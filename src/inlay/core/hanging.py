"""Registering an adapter's tensors below modules, where their slots say, and dropping them again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from inlay.core.bare import Names, NoDropout, bare
from inlay.core.entry import AdapterTensors
from inlay.core.slot import Slot
from inlay.core.state import State

if TYPE_CHECKING:
    from inlay.core.holder import EntryHolder
    from inlay.core.plan import Placement

__all__ = ["container", "dismount", "drop_shared", "forget_unused", "hang", "hang_all", "hang_dropout", "hung_dropouts"]


def hang(
    home: nn.Module,
    adapter: str,
    slot: Slot,
    tensor: Tensor,
    new_leaf: Callable[[], nn.Module],
    trainable: bool = True,
) -> None:
    """Register one tensor below ``home`` where its slot says, making what is missing on the way.

    It has a gradient if ``trainable`` and if its slot lets it have one.
    """
    containers, leaf = slot.place
    value = tensor if slot.buffer else _parameter(tensor, trainable and slot.trainable)
    holder: Any = container(home, containers, Names if leaf else AdapterTensors)
    if not leaf:
        holder[adapter] = value
        if slot.buffer and not slot.saved:
            holder._non_persistent_buffers_set.add(adapter)
        return
    module = holder._modules.get(adapter)
    if module is None:
        module = new_leaf()
        module.__dict__["training"] = home.training
        holder._modules[adapter] = module
    *below, leaf = leaf.split(".")
    for part in below:
        module = container(module, (part,), nn.Module)
        module.__dict__["training"] = home.training
    if slot.buffer:
        module._buffers[leaf] = value
        if not slot.saved:
            module._non_persistent_buffers_set.add(leaf)
    else:
        module._parameters[leaf] = value


def hang_all(
    layer: nn.Module, adapter: str, placement: Placement, tensors: dict[str, Tensor], trainable: bool = True
) -> None:
    """Register a placement's tensors below its layer; see :func:`hang`."""
    kind, site = placement.kind, placement.site
    below: dict[str, Any] = layer._modules
    for role, slot, containers, leaf, plain in placement.slots.hung:
        if role in placement.borrowed:
            _borrow(layer, adapter, containers, placement.borrowed[role])
            continue
        if not plain:
            hang(layer, adapter, slot, tensors[role], partial(kind.leaf, site, slot), trainable)
            continue
        name = containers[0]
        holder = below.get(name)  # the usual case, with few calls: a model has thousands of places
        if holder is None:
            holder = below[name] = _in_mode_of(layer, Names)
        held = holder._modules
        module = held.get(adapter)
        if module is None:
            module = held[adapter] = kind.leaf(site, slot)
            module.__dict__["training"] = layer.training
        module._parameters[leaf] = _parameter(tensors[role], trainable and slot.trainable)


def hang_dropout(layer: EntryHolder, field: str, adapter: str, p: float) -> None:
    """Give an adapter its dropout below a layer; one of chance 0 is made when somebody asks for it.

    Most adapters have none, and what stands for it is a third of their modules.
    """
    if p > 0.0:
        hung_dropouts(layer, field)._modules[adapter] = nn.Dropout(p)
    elif field in layer._modules:
        container(layer, (field,), Names)._modules[adapter] = _no_dropout(layer)


def hung_dropouts(layer: EntryHolder, field: str) -> nn.Module:
    """Return the dropouts of a layer's adapters by name, making those that there are none of so far."""
    holder = container(layer, (field,), Names)
    for name, entries in layer.__dict__["entries"].items():
        if name not in holder._modules and any(entry.method.dropout_field == field for entry in entries):
            holder._modules[name] = _no_dropout(layer)
    return holder


def _no_dropout(layer: nn.Module) -> nn.Module:
    return _in_mode_of(layer, NoDropout)


def _in_mode_of(layer: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """Return a new module of a class, in training or eval mode as a layer is."""
    made = bare(cls)
    made.__dict__["training"] = layer.training
    return made


def _borrow(layer: nn.Module, adapter: str, containers: tuple[str, ...], lender: Placement) -> None:
    """Let a layer have the very module that holds a tensor of another layer."""
    from inlay.core.initial import standing

    held: Any = standing(lender)
    for part in containers:
        held = held._modules[part]
    container(layer, containers, Names)._modules[adapter] = held._modules[adapter]


def _parameter(tensor: Tensor, trainable: bool) -> nn.Parameter:
    if type(tensor) is Tensor:
        return Tensor._make_subclass(nn.Parameter, tensor, trainable)  # all that the constructor does with such
    return nn.Parameter(tensor, requires_grad=trainable)


def drop_shared(state: State, slots: dict[str, Slot], adapter: str) -> None:
    """Drop an adapter's shared tensors."""
    for slot in slots.values():
        _drop(state.shared, slot.place[0], adapter)


def forget_unused(state: State, adapter: str) -> None:
    """Drop the record of an adapter that was taken off its layers one by one, once none of them has it."""
    if adapter not in state.records or any(layer.has(adapter) for layer in state.layers()):
        return
    drop_shared(state, state.records.pop(adapter).shared, adapter)
    state.training.discard(adapter)
    state.active = tuple(name for name in state.active if name != adapter)
    state.touch()


def container(layer: nn.Module, path: tuple[str, ...], cls: type[nn.Module]) -> nn.Module:
    """Return the container at a path below a layer, making what is missing."""
    holder = layer
    for depth, part in enumerate(path):
        found = holder._modules.get(part)
        if found is None:
            found = _in_mode_of(layer, cls if depth == len(path) - 1 else nn.Module)
            holder._modules[part] = found
        holder = found
    return holder


def dismount(layer: EntryHolder, adapter: str) -> None:
    """Drop everything that an adapter has at a layer; containers that end empty go too."""
    own = layer.__dict__
    entries = own["entries"].pop(adapter, ())
    below = own["_modules"]
    for entry in entries:
        for _, path, leaf in entry.places:
            if not leaf or len(path) != 1:
                _drop(layer, path, adapter)
                continue
            name = path[0]
            if name in below:  # the usual case, with few calls: a model has thousands of places
                held = below[name].__dict__["_modules"]
                held.pop(adapter, None)
                if not held:
                    del below[name]
        field = entry.method.dropout_field
        if field in below:
            held = below[field]._modules
            held.pop(adapter, None)
            made = bool(getattr(entry.method.config, field))  # its coming made those that stand for nothing
            if not held or (made and all(type(module) is NoDropout for module in held.values())):
                del below[field]


def _drop(layer: nn.Module, path: tuple[str, ...], adapter: str) -> None:
    holders = [layer]
    for part in path:
        found = holders[-1]._modules.get(part)
        if found is None:
            return
        holders.append(found)
    last = holders[-1]
    last._modules.pop(adapter, None)
    last._parameters.pop(adapter, None)
    if last._buffers.pop(adapter, None) is not None:
        last._non_persistent_buffers_set.discard(adapter)
    for depth in range(len(path), 0, -1):
        held = holders[depth]
        if held._modules or held._parameters or held._buffers:
            break
        del holders[depth - 1]._modules[path[depth - 1]]
