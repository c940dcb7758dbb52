"""Where an adapter's gradients are switched, remembered with its record.

Finding a tensor below a layer passes five objects, and takes ten times as long as switching its gradient. What is
remembered is used as long as each layer has the same entries, and each container the same module; it holds no layer,
and goes when the adapter is taken off any layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.core.surface import LayerSurface

if TYPE_CHECKING:
    from inlay.core.state import State

__all__ = ["Tensors", "train_everywhere"]

# (modules of one, name of another among them, that one), for each module on the way to a tensor
Link = tuple[dict[str, Any], str, nn.Module]
# (parameters of a module, name of one)
Place = tuple[dict[str, Any], str]


class Tensors:
    """The tensors of one adapter that may train, and the followers that are to be asked.

    Attributes:
        roster: the state's count of comings and goings of layers.
        layers: (entries of a layer by adapter, the adapter's, the way to their tensors, places of them).
        others: followers that switch gradients in a way of their own.
    """

    __slots__ = ("layers", "others", "roster")

    def __init__(self, state: State, name: str) -> None:
        self.roster = state.roster
        self.layers: list[tuple[dict[str, Any], Any, list[Link], list[Place]]] = []
        self.others: list[weakref.ref[Any]] = []
        for layer in state.layers():
            if getattr(type(layer), "train_adapter", None) is not LayerSurface.train_adapter:
                self.others.append(weakref.ref(layer))
                continue
            held = layer.entries.get(name)
            if held is not None:
                links: dict[tuple[int, str], Link] = {}
                places = [place for entry in held for place in _places(entry, layer, links)]
                self.layers.append((layer.entries, held, list(links.values()), places))

    def train(self, name: str, trainable: bool) -> bool:
        """Switch the gradients; False if something is not where it was, and not all of them are switched."""
        for entries, held, links, places in self.layers:
            if entries.get(name) is not held:
                return False
            for modules, key, module in links:
                if modules.get(key) is not module:
                    return False
            for parameters, leaf in places:
                tensor = parameters.get(leaf)
                if tensor is not None and tensor.requires_grad is not trainable and tensor.is_floating_point():
                    tensor.requires_grad = trainable
        for ref in self.others:
            layer = ref()
            if layer is not None:
                layer.train_adapter(name, trainable)
        return True


def _places(entry: Any, layer: nn.Module, links: dict[tuple[int, str], Link]) -> Iterator[Place]:
    """Iterate over the places of an entry's tensors that may train; adds what is on the way to ``links``."""
    for _, containers, leaf in entry.trained:
        module: Any = entry.home if entry.home is not None else layer
        *below, leaf = (entry.name, *leaf.split(".")) if leaf else (entry.name,)
        for part in (*containers, *below):
            modules = module._modules
            module = modules[part]
            links[id(modules), part] = (modules, part, module)
        yield module._parameters, leaf


def train_everywhere(state: State, name: str, trainable: bool) -> None:
    """Switch an adapter's gradients on or off at every layer."""
    record = state.records[name]
    known = record.tensors
    if known is not None and known.roster == state.roster and known.train(name, trainable):
        return
    record.tensors = known = Tensors(state, name)
    known.train(name, trainable)
