"""The rank of an adapter that a model has: another configuration for its layers, and tensors with more or less room."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.keys import slot_holder
from inlay.core.entry import Entry, find_tensor
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.sliced import Sliced
from inlay.core.slot import Slot
from inlay.core.state import State
from inlay.core.tied import Tied
from inlay.errors import UnsupportedError
from inlay.parallel.tensors import is_distributed

__all__ = ["RANK_FIELDS", "Sized", "entries_of", "own_entries", "renewed", "successor", "with_rank"]

# The fields of a configuration that say how large an adapter's tensors are and how they are scaled.
RANK_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def with_rank(config: Any, of: Any) -> Any:
    """Return a copy of a configuration that has the rank and the scale of another one."""
    changed = copy.deepcopy(config)
    for field in RANK_FIELDS:
        setattr(changed, field, copy.deepcopy(getattr(of, field)))
    return changed


def renewed(method: Method, config: Any) -> Method:
    """Return a method as it is, with another configuration."""
    new = copy.copy(method)
    new.config = config
    return new


def successor(method: Method, new: Method) -> Method:
    """Return what follows on the method of one layer, when its adapter's method becomes ``new``."""
    if not isinstance(method, (Sliced, Tied)):
        return new  # one object for all layers, as compiled code has found it
    around = copy.copy(method)
    around.config, around.method = new.config, new
    return around


def entries_of(state: State, adapter: str) -> Iterator[tuple[AdaptedLayer, Entry]]:
    """Iterate over the layers that have an adapter, with what it has there; token rows beside it are left out."""
    method = state.record(adapter).method
    for layer in state.layers():
        if isinstance(layer, AdaptedLayer):
            for entry in layer.entries.get(adapter, ()):
                if (entry.method.method if isinstance(entry.method, (Sliced, Tied)) else entry.method) is method:
                    yield layer, entry


def own_entries(state: State, adapter: str) -> Iterator[tuple[AdaptedLayer, Entry]]:
    """The same without layers that use the tensors of another one."""
    return ((layer, entry) for layer, entry in entries_of(state, adapter) if entry.home is None)


@dataclass(eq=False)
class Sized:
    """One tensor of an adapter whose rank may change.

    Attributes:
        layer, entry, role: whose it is.
        slot: what it is to be a tensor of, which says its shape without room.
        room: the shape that it is to have in memory.
    """

    layer: AdaptedLayer
    entry: Entry
    role: str
    slot: Slot
    room: tuple[int, ...]

    @property
    def place(self) -> tuple[tuple[str, ...], str]:
        return next((containers, leaf) for role, containers, leaf in self.entry.places if role == self.role)

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is in memory now."""
        return find_tensor(self.layer, self.entry.name, *self.place)

    @property
    def holder(self) -> tuple[nn.Module, str]:
        """The module that holds it, and its name there."""
        return slot_holder(self.layer, self.entry.name, *self.place)

    def check(self) -> None:
        """Refuse what cannot get another shape.

        Raises:
            UnsupportedError: the tensor is spread over processes.
        """
        if is_distributed(self.tensor) and tuple(self.tensor.shape) != self.room:
            raise UnsupportedError(
                f"{self.layer.site.name!r}: {self.slot.key!r} of adapter {self.entry.name!r} is spread over processes "
                f"and cannot get another rank ({tuple(self.tensor.shape)} to {self.room}); give it room before sharding"
            )

    @torch.no_grad()
    def write(self, value: Tensor) -> None:
        """Put a value of the shape ``room`` in, in place where the shape stays; the parameter object stays anyway."""
        tensor = self.tensor
        if tuple(tensor.shape) == self.room:
            tensor.copy_(value)
        else:
            tensor.data = value.to(device=tensor.device, dtype=tensor.dtype)
            tensor.grad = None
            self._resize_leaf()
        if self.room == self.slot.shape:
            self.entry.room.pop(self.role, None)
        else:
            self.entry.room[self.role] = self.room

    def _resize_leaf(self) -> None:
        """Let the module around the tensor know its new sizes, as far as it can be called."""
        holder, _ = self.holder
        like = self.layer.kind.leaf(self.layer.site, replace(self.slot, shape=self.room))
        for name in ("in_features", "out_features", "in_channels", "out_channels"):
            if name in like.__dict__ and name in holder.__dict__:
                setattr(holder, name, like.__dict__[name])
