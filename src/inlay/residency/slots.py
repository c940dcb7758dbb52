"""The slots of a model: adapters of one largest rank, whose tensors others are copied into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.keys import key_index, slot_holder
from inlay.checkpoint.resolve import listed, resolve
from inlay.checkpoint.target import KeyIndex
from inlay.checkpoint.tree import Tree
from inlay.core.entry import Entry, find_tensor
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.registry import method_class
from inlay.core.slot import Slot
from inlay.core.state import State
from inlay.errors import CheckpointMismatchError, ConfigError, UnsupportedError, nearest

__all__ = ["Fitted", "Slots"]

# What an adapter may have besides tensors at layers, none of which a slot has.
_BESIDE = ("modules_to_save", "trainable_token_indices", "layer_replication")


@dataclass(eq=False, slots=True)
class _Place:
    """One tensor that every slot has.

    Attributes:
        key: what a checkpoint calls it.
        layer, position: where: the layer, and which of the slot's entries there.
        role, slot: what it is there, in its largest size.
        containers, leaf: where it hangs below the layer, apart from the slot's name.
    """

    key: str
    layer: AdaptedLayer
    position: int
    role: str
    slot: Slot
    containers: tuple[str, ...]
    leaf: str

    @property
    def axis(self) -> int | None:
        """The axis of the rank."""
        return self.slot.dims.index("r") if "r" in self.slot.dims else None


@dataclass(eq=False, slots=True)
class Fitted:
    """An adapter that fits into a slot.

    Attributes:
        config, method: the adapter's.
        options: its numbers at each layer, in the order of :meth:`Slots.entries`.
        values: its tensors, by place.
    """

    config: Any
    method: Method
    options: list[dict[str, Any]]
    values: dict[_Place, Tensor] = field(default_factory=dict)


class Slots:
    """What the slots of a model have in common.

    Args:
        model: the bare model.
        names: of the slots, which are adapters of equal layout.

    Raises:
        UnsupportedError: the layout has tensors that adapters cannot be copied into.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        tree = Tree(model)
        self.state: State = tree.state
        self.names = names
        self.method = self.state.record(names[0]).method
        self.index: KeyIndex = key_index(tree, names[0])
        self.places = list(self._found(names[0]))
        if len(self.places) != len(self.index.targets):
            known = {place.key for place in self.places}
            odd = next(target.memory for key, target in self.index.targets.items() if key not in known)
            raise UnsupportedError(f"slots cannot hold {odd!r}: only tensors of layers can be exchanged")
        self._by_target = {self.index.targets[place.key]: place for place in self.places}
        self._by_key = {place.key: place for place in self.places}

    def _found(self, name: str) -> Iterator[_Place]:
        for layer in self.state.layers():
            for position, entry in enumerate(layer.entries.get(name, ()) if isinstance(layer, AdaptedLayer) else ()):
                if entry.home is not None:
                    raise UnsupportedError(
                        f"slots cannot hold {layer.site.name!r}: it uses the tensors of a layer that it is tied to"
                    )
                slots = entry.method.slots(entry.site)
                for role, containers, leaf in entry.places:
                    target = self.index.holding(*slot_holder(layer, name, containers, leaf))
                    if target is not None:
                        yield _Place(target.key, layer, position, role, slots[role], containers, leaf)

    def entries(self, name: str) -> Iterator[tuple[AdaptedLayer, int, Entry]]:
        """Iterate over what a slot has: (layer, position there, entry)."""
        seen: set[tuple[int, int]] = set()
        for place in self.places:
            at = (id(place.layer), place.position)
            if at not in seen:
                seen.add(at)
                yield place.layer, place.position, place.layer.entries[name][place.position]

    def tensors(self, name: str) -> list[Tensor]:
        """Return a slot's tensors, in the order of the places."""
        return [find_tensor(place.layer, name, place.containers, place.leaf) for place in self.places]

    # -- does an adapter fit? ---------------------------------------------------------------------------------------

    def fitted(self, adapter: str, config: Any, tensors: Mapping[str, Tensor]) -> Fitted:
        """Return how an adapter fills a slot. Values are not read.

        Args:
            adapter: its name, for messages.
            config, tensors: what its files say.

        Raises:
            ConfigError: another method, or something that slots do not have.
            CheckpointMismatchError: other layers, a larger rank, or other shapes.
        """
        method = self._method(adapter, config)
        found = self._placed(adapter, tensors)
        fit = Fitted(config, method, [], found)
        present = {(id(place.layer), place.position) for place in found}
        room: dict[tuple[int, int], tuple[dict[str, Any], dict[str, Any]]] = {}
        for layer, position, entry in self.entries(self.names[0]):
            options = method.options(entry.site)
            fit.options.append(options)
            room[id(layer), position] = (options, self.method.options(entry.site))
        for place in self.places:
            at = (id(place.layer), place.position)
            value = found.get(place)
            if value is not None:
                self._check_shape(adapter, place, value, *room[at])
            elif at in present:
                raise CheckpointMismatchError(f"adapter {adapter!r}: expected the key {place.key!r}, found none")
            elif not self.method.additive or place.axis is None:
                raise CheckpointMismatchError(
                    f"adapter {adapter!r} does not have the layer {place.layer.site.name!r} that the slots have, and "
                    f"{type(self.method).__name__} cannot be taken out of effect at one layer; make slots for the "
                    "layers of its own"
                )
        return fit

    def _method(self, adapter: str, config: Any) -> Method:
        wanted = type(self.method)
        found = method_class(config.peft_type).variant(config)
        if found is not wanted:
            raise ConfigError(
                f"adapter {adapter!r} is one of {found.__name__}, and the slots were made for {wanted.__name__}"
            )
        for name in _BESIDE:
            if getattr(config, name, None):
                raise ConfigError(f"adapter {adapter!r}: {name} is set, and slots hold tensors of layers only")
        method = found(config)
        method.prefix_patterns = self.method.prefix_patterns
        if method.bias_mode() != "none":
            raise ConfigError(
                f"adapter {adapter!r}: bias={method.bias_mode()!r} changes the base model, which is shared"
            )
        return method

    def _placed(self, adapter: str, tensors: Mapping[str, Tensor]) -> dict[_Place, Tensor]:
        """Return an adapter's tensors by place."""
        if tensors and tensors.keys() <= self._by_key.keys():
            return {self._by_key[key]: value for key, value in tensors.items()}
        found = resolve(self.index, tensors, adapter)
        if found.unexpected or not tensors:
            shown = found.unexpected[:3]
            near = {key: nearest(key, list(self._by_key), 1) for key in shown}
            raise CheckpointMismatchError(
                f"adapter {adapter!r} does not fit the slots: "
                + listed([f"{key!r}" + (f" (near: {near[key][0]!r})" if near[key] else "") for key in shown])
                + (f" and {len(found.unexpected) - 3} more" if len(found.unexpected) > 3 else "")
                + (" belong to no layer that the slots have" if tensors else "it has no tensors")
            )
        both = {**found.found, **found.misshaped}
        return {self._by_target[target]: value for target, (_, value) in both.items()}

    def _check_shape(
        self, adapter: str, place: _Place, value: Tensor, options: dict[str, Any], room: dict[str, Any]
    ) -> None:
        expected = list(place.slot.shape)
        axis = place.axis
        if axis is not None and "r" in options:
            rank, largest = options["r"], room["r"]
            if rank > largest:
                raise CheckpointMismatchError(
                    f"adapter {adapter!r} has rank {rank} at {place.layer.site.name!r}, and the slots have room for "
                    f"{largest}; make them with r={rank}"
                )
            if rank != largest and not place.slot.key.startswith("lora_"):
                raise CheckpointMismatchError(
                    f"adapter {adapter!r} has r={rank}, and the slots r={largest}: only low-rank updates can be filled "
                    "up with zeros"
                )
            expected[axis] = expected[axis] * rank // largest
        if list(value.shape) != expected:
            raise CheckpointMismatchError(
                f"adapter {adapter!r}: expected {place.key!r} of shape {tuple(expected)}, found {tuple(value.shape)}"
            )

    # -- writing ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def write(self, name: str, fit: Fitted) -> None:
        """Copy an adapter into a slot; what its rank leaves over, and layers that it does not have, become zeros."""
        into: list[Tensor] = []
        values: list[Tensor] = []
        rest: list[Tensor] = []
        rooms: dict[tuple[int, int], dict[str, tuple[int, ...]]] = {}
        for place, held in zip(self.places, self.tensors(name), strict=True):
            value = fit.values.get(place)
            if value is None:
                rest.append(held)
                rooms.setdefault((id(place.layer), place.position), {})[place.role] = tuple(held.shape)
                continue
            if value.shape != held.shape:
                axis = place.axis
                assert axis is not None
                rooms.setdefault((id(place.layer), place.position), {})[place.role] = tuple(held.shape)
                if place.slot.blocks > 1:
                    value = place.slot.resized(value, held.shape)
                else:
                    size = value.shape[axis]
                    rest.append(held.narrow(axis, size, held.shape[axis] - size))
                    held = held.narrow(axis, 0, size)
            into.append(held)
            values.append(value)
        if rest:
            torch._foreach_zero_(rest)
        if into:
            torch._foreach_copy_(into, values, non_blocking=True)
        for (layer, position, entry), options in zip(self.entries(name), fit.options, strict=True):
            entry.method = fit.method
            entry.room = rooms.get((id(layer), position), {})
            for option, number in options.items():
                present = entry.options.get(option)
                if isinstance(present, Tensor):
                    present.fill_(number)  # compiled code may hold the tensor itself
                else:
                    entry.set(option, number)
        record = self.state.record(name)
        record.method, record.config, record.saved = fit.method, fit.config, {}
        self.state.touch()
