"""What one adapter has at one layer, and the containers that its tensors hang in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn

from inlay.core.affine import Site
from inlay.core.method import Method
from inlay.core.slot import Slot
from inlay.errors import StateError

if TYPE_CHECKING:
    from inlay.core.layer import AdaptedLayer

__all__ = ["AdapterTensors", "Entry", "MergedNames", "OptionView", "Roles", "find_tensor"]


class AdapterTensors(nn.ParameterDict):
    """Parameters and buffers by adapter name; reads like a dict.

    Any adapter name can be a key, also one that names an attribute of ``nn.Module``.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @property
    def _keys(self) -> dict[str, None]:  # type: ignore[override]  # what the methods that are inherited go by
        return dict.fromkeys(self)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor | None = self._parameters.get(name)
        if tensor is None:
            tensor = self._buffers.get(name)
        if tensor is None:
            raise KeyError(name)
        return tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter):
            self._parameters[name] = tensor
        else:
            self._buffers[name] = tensor

    def __delitem__(self, name: str) -> None:
        if self._parameters.pop(name, None) is None and self._buffers.pop(name, None) is None:
            raise KeyError(name)
        self._non_persistent_buffers_set.discard(name)

    def __contains__(self, name: object) -> bool:
        return name in self._parameters or name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter([*self._parameters, *self._buffers])

    def __len__(self) -> int:
        return len(self._parameters) + len(self._buffers)

    def values(self) -> list[Tensor]:
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, Tensor]]:
        return [(name, self[name]) for name in self]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self.items())


class Roles(NamedTuple):
    """Where the tensors of some slots hang, as :class:`Entry` has it; sites that a method treats alike share it."""

    places: tuple[tuple[str, tuple[str, ...], str], ...]
    weights: tuple[str, ...]
    trained: tuple[tuple[str, tuple[str, ...], str], ...]
    holders: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, slots: dict[str, Slot]) -> Roles:
        places = tuple((role, *slot.place) for role, slot in slots.items())
        weights = tuple(role for role, slot in slots.items() if not slot.buffer)
        trained = tuple(place for place in places if slots[place[0]].trainable)
        return cls(places, weights, trained, tuple(dict.fromkeys(path for _, path, _ in places)))


class Entry:
    """One adapter's method at one layer.

    Attributes:
        name: the adapter.
        method, site: as planned.
        options: the site's numbers; changed through the layer's views.
        places: (role, containers below the layer, attribute below the adapter's name) of each slot.
        shared: the same for the tensors that all layers share, below ``state.shared``.
        home: the module that holds the containers: the layer itself, or another one for tied tensors.
        weights: roles of the slots that are parameters.
        trained: those of ``places`` whose slots let them train.
        holders: the containers of ``places``, each once.
        mesh: the device mesh that the base weight is spread over by tensor parallelism, if it is.
        skip_probability: chance of leaving the adapter out of one training forward (``module_dropout``).
        room: shape by role of tensors that have a larger rank than their slots, filled up with zeros, so that an
            adapter of another rank can take their place.
        compiled: the numbers of the place in which compiled code has the adapter; see ``core.fixed``.
    """

    __slots__ = (
        "compiled",
        "holders",
        "home",
        "mesh",
        "method",
        "name",
        "options",
        "places",
        "room",
        "shared",
        "site",
        "skip_probability",
        "trained",
        "weights",
    )

    def __init__(self, name: str, method: Method, site: Site, roles: Roles, options: dict[str, Any]) -> None:
        self.name = name
        self.method = method
        self.site = site
        self.options = options
        self.places, self.weights, self.trained, self.holders = roles
        self.shared: tuple[tuple[str, tuple[str, ...], str], ...] = ()
        self.home: nn.Module | None = None
        self.mesh: Any = None
        self.skip_probability = method.skip_probability
        self.room: dict[str, tuple[int, ...]] = {}
        self.compiled: dict[str, Tensor] | None = None

    def set(self, option: str, value: Any) -> None:
        """Change a number; one that is a tensor stays a tensor, because compiled code has no guard on its value."""
        held = self.options.get(option)
        if isinstance(held, Tensor):
            value = torch.as_tensor(value, dtype=held.dtype, device=held.device)
        self.options[option] = value
        if self.compiled is not None and option in self.compiled:
            with torch.no_grad():
                self.compiled[option].fill_(value)

    def parameters(self, layer: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
        """Iterate over the entry's own parameters at ``layer``, with whether its slots let them train."""
        home = self.home if self.home is not None else layer
        for place in self.places:
            tensor = find_tensor(home, self.name, *place[1:])
            if isinstance(tensor, nn.Parameter):
                yield tensor, place in self.trained

    def train(self, layer: nn.Module, trainable: bool) -> None:
        """Switch gradients at ``layer`` on or off; what never trains stays off."""
        home = self.home if self.home is not None else layer
        name = self.name
        for _, containers, leaf in self.trained:
            holder: Any = home  # what find_tensor does, without its calls: a model has thousands of tensors to switch
            for part in containers:
                holder = holder._modules[part]
            tensor = holder._modules[name]._parameters.get(leaf) if leaf else holder._parameters.get(name)
            if tensor is None:
                tensor = find_tensor(home, name, containers, leaf)
                if not isinstance(tensor, nn.Parameter):
                    continue
            if tensor.requires_grad is not trainable and tensor.is_floating_point():
                tensor.requires_grad = trainable


def find_tensor(home: nn.Module, adapter: str, containers: tuple[str, ...], leaf: str) -> Tensor:
    """Return the tensor that a slot's place means below ``home``."""
    holder: Any = home
    for part in containers:
        holder = holder._modules[part]
    if not leaf:
        return holder[adapter]
    owner = holder._modules[adapter]
    tensor = owner._parameters.get(leaf)
    if tensor is not None:
        return tensor
    *below, leaf = leaf.split(".")
    for part in below:
        owner = owner._modules[part]
    return getattr(owner, leaf)


class OptionView(MutableMapping[str, Any]):
    """One number of a layer by adapter name (``layer.scaling["default"]``); writing it changes the layer."""

    def __init__(self, layer: AdaptedLayer, option: str) -> None:
        self._layer = layer
        self._option = option

    def _entry(self, name: str) -> Entry:
        for entry in self._layer.entries.get(name, ()):
            if self._option in entry.options:
                return entry
        raise KeyError(name)

    def __getitem__(self, name: str) -> Any:
        return self._entry(name).options[self._option]

    def __setitem__(self, name: str, value: Any) -> None:
        self._entry(name).set(self._option, value)
        self._layer.state.touch()

    def __delitem__(self, name: str) -> None:
        raise StateError(f"{self._option!r} of an adapter cannot be removed; delete the adapter instead")

    def __iter__(self) -> Iterator[str]:
        return (
            name
            for name, entries in self._layer.entries.items()
            if any(self._option in entry.options for entry in entries)
        )

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


class MergedNames(list[str]):
    """Names of what is merged into a layer. Changing the list changes the layer's books, and no weight."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer._merged)
        self._layer = layer

    def _write(self) -> None:
        self._layer.merged_adapters = self

    def append(self, name: str) -> None:
        super().append(name)
        self._write()

    def extend(self, names: Iterable[str]) -> None:
        super().extend(names)
        self._write()

    def insert(self, index: SupportsIndex, name: str) -> None:
        super().insert(index, name)
        self._write()

    def __setitem__(self, index: Any, names: Any) -> None:
        super().__setitem__(index, names)
        self._write()

    def __delitem__(self, index: SupportsIndex | slice) -> None:
        super().__delitem__(index)
        self._write()

    def remove(self, name: str) -> None:
        super().remove(name)
        self._write()

    def pop(self, index: SupportsIndex = -1) -> str:
        name = super().pop(index)
        self._write()
        return name

    def clear(self) -> None:
        super().clear()
        self._write()

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)
