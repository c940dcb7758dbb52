"""Where an adapter's gradients are switched, remembered with its record.

Finding a tensor below a layer passes five objects, and takes ten times as long as switching its gradient. What is
remembered is used as long as each layer has the same entries, and each container the same module; it holds no layer,
and goes when the adapter is taken off any layer.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.core.surface import LayerSurface

if TYPE_CHECKING:
    from inlay.core.state import State

__all__ = ["Tensors", "train_everywhere"]

# (modules of a container, name of one, that module, parameters of it, name of one)
Place = tuple[dict[str, Any], str, Any, dict[str, Any], str]


class Tensors:
    """The tensors of one adapter that may train, and the followers that are to be asked.

    Attributes:
        roster: the state's count of comings and goings of layers.
        layers: (entries of a layer by adapter, the adapter's, places of their tensors).
        others: followers that switch gradients in a way of their own.
    """

    __slots__ = ("layers", "others", "roster")

    def __init__(self, state: State, name: str) -> None:
        self.roster = state.roster
        self.layers: list[tuple[dict[str, Any], Any, list[Place]]] = []
        self.others: list[weakref.ref[Any]] = []
        for layer in state.layers():
            if getattr(type(layer), "train_adapter", None) is not LayerSurface.train_adapter:
                self.others.append(weakref.ref(layer))
                continue
            held = layer.entries.get(name)
            if held is not None:
                found = (place for entry in held for place in _places(entry, layer))
                self.layers.append((layer.entries, held, list(found)))

    def train(self, name: str, trainable: bool) -> bool:
        """Switch the gradients; False if something is not where it was, and not all of them are switched."""
        for entries, held, places in self.layers:
            if entries.get(name) is not held:
                return False
            for modules, key, owner, parameters, leaf in places:
                if modules.get(key) is not owner:
                    return False
                tensor = parameters.get(leaf)
                if tensor is not None and tensor.requires_grad is not trainable and tensor.is_floating_point():
                    tensor.requires_grad = trainable
        for ref in self.others:
            layer = ref()
            if layer is not None:
                layer.train_adapter(name, trainable)
        return True


def _places(entry: Any, layer: nn.Module) -> list[Place]:
    found: list[Place] = []
    for _, containers, leaf in entry.trained:
        above: Any = None
        holder: Any = entry.home if entry.home is not None else layer
        for part in containers:
            above, holder = holder, holder._modules[part]
        if leaf:
            owner = holder._modules[entry.name]
            found.append((holder._modules, entry.name, owner, owner._parameters, leaf))
        else:
            found.append((above._modules, containers[-1], holder, holder._parameters, entry.name))
    return found


def train_everywhere(state: State, name: str, trainable: bool) -> None:
    """Switch an adapter's gradients on or off at every layer."""
    record = state.records[name]
    known = record.tensors
    if known is not None and known.roster == state.roster and known.train(name, trainable):
        return
    record.tensors = known = Tensors(state, name)
    known.train(name, trainable)
