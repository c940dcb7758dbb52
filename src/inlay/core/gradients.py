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

__all__ = ["Reach", "reach_of", "train_everywhere"]

# (modules of one, name of another among them, that one), for each module on the way to a tensor
Link = tuple[dict[str, Any], str, nn.Module]
# (parameters of a module, name of one)
Place = tuple[dict[str, Any], str]


class Reach:
    """Where one adapter is in a model: its tensors that may train, and the followers that are to be asked.

    Attributes:
        roster: the state's count of comings and goings of layers, and of merges.
        agreed: whether every layer agreed to have this adapter active and no other.
        entries: (entries of a layer by adapter, the adapter's).
        links: the way from the layers to the tensors.
        places: of the tensors.
        others: followers that switch gradients in a way of their own.
    """

    __slots__ = ("agreed", "entries", "links", "others", "places", "roster")

    def __init__(self, state: State, name: str) -> None:
        self.roster = state.roster
        self.agreed = False
        self.entries: list[tuple[dict[str, Any], Any]] = []
        self.others: list[weakref.ref[Any]] = []
        links: dict[tuple[int, str], Link] = {}
        places: dict[tuple[int, str], Place] = {}
        for layer in state.layers():
            if getattr(type(layer), "train_adapter", None) is not LayerSurface.train_adapter:
                self.others.append(weakref.ref(layer))
                continue
            held = layer.entries.get(name)
            if held is not None:
                self.entries.append((layer.entries, held))
                for entry in held:
                    _find(entry, layer, links, places)
        self.links = list(links.values())
        self.places = list(places.values())

    def train(self, name: str, trainable: bool) -> bool:
        """Switch the gradients; False if something is not where it was, and not all of them are switched."""
        for entries, held in self.entries:
            if entries.get(name) is not held:
                return False
        for modules, key, module in self.links:
            if modules.get(key) is not module:
                return False
        try:
            for parameters, leaf in self.places:
                tensor = parameters.get(leaf)
                if tensor is not None:
                    tensor.requires_grad = trainable  # as it is mostly not; to ask first takes as long
        except RuntimeError:  # whole numbers, or no leaf: who asks before switching passes it by
            return False
        for ref in self.others:
            layer = ref()
            if layer is not None:
                layer.train_adapter(name, trainable)
        return True


def _find(
    entry: Any, layer: nn.Module, links: dict[tuple[int, str], Link], places: dict[tuple[int, str], Place]
) -> None:
    """Add the places of an entry's tensors that may train, and what is on the way to them."""
    for _, containers, leaf in entry.trained:
        module: Any = entry.home if entry.home is not None else layer
        *below, leaf = (entry.name, *leaf.split(".")) if leaf else (entry.name,)
        for part in (*containers, *below):
            modules = module._modules
            module = modules[part]
            links[id(modules), part] = (modules, part, module)
        place = (module._parameters, leaf)
        places[id(place[0]), place[1]] = place


def reach_of(state: State, name: str) -> Reach:
    """Return where an adapter is, from before where no layer has come or gone since."""
    record = state.records[name]
    known = record.reach
    if known is None or known.roster != state.roster:
        known = record.reach = Reach(state, name)
    return known


def train_everywhere(state: State, name: str, trainable: bool) -> None:
    """Switch an adapter's gradients on or off at every layer."""
    if reach_of(state, name).train(name, trainable):
        return
    state.records[name].reach = None
    if not reach_of(state, name).train(name, trainable):
        for layer in state.layers():
            layer.train_adapter(name, trainable)
