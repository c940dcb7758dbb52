"""A tensor that checkpoints hold, and the index of all that one adapter has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.tree import MODEL_PREFIX
from inlay.core.slot import Slot
from inlay.errors import CheckpointError
from inlay.parallel.tensors import gather

__all__ = ["KeyIndex", "Target"]


@dataclass(eq=False, slots=True)
class Target:
    """One tensor of the model that a checkpoint holds.

    Attributes:
        key: its name in a checkpoint of a wrapped model.
        module, attribute: where it lives: a parameter or a buffer of that module.
        shape: the whole shape, whatever part of it this process holds.
        memory: its name in ``state_dict()`` of the whole model.
        part: ``slot``, ``shared``, ``copy`` (``modules_to_save``), ``bias`` or ``embedding``.
        saved: False for tensors that are made again from the config.
        aliases: other names that older files have for it.
        around: names with the adapter's own inside, as what stands before it and what behind it.
        device: where it belongs while it is on the meta device.
        slot: what the tensor is a slot of.
        room: its shape here where that has a larger rank than ``shape``, the rest being zeros.
    """

    key: str
    module: nn.Module
    attribute: str
    shape: torch.Size
    memory: str
    part: str
    saved: bool = True
    aliases: tuple[str, ...] = ()
    around: tuple[tuple[str, str], ...] = ()
    device: torch.device | None = None
    slot: Slot | None = None
    room: torch.Size | None = None

    @property
    def templates(self) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
        """The names with the adapter's own inside, as segments above and below it."""
        return [(_segments(before), _segments(after)) for before, after in self.around]

    @property
    def table(self) -> dict[str, Any]:
        """The module's dict that holds the tensor."""
        held = self.module._parameters
        return held if self.attribute in held else self.module._buffers

    @property
    def tensor(self) -> Tensor:
        """The tensor as it is now; maybe a part of the whole, maybe on the meta device."""
        tensor: Any = self.module._parameters.get(self.attribute)
        return self.table[self.attribute] if tensor is None else tensor

    def whole(self, tensor: Tensor) -> Tensor:
        """Return ``tensor``, a value for this target, gathered and proved to be whole.

        Raises:
            CheckpointError: it is on the meta device, or a shard that cannot be gathered from here.
        """
        full = gather(tensor)
        if full.is_meta:
            raise CheckpointError(f"{self.memory!r} is on the meta device: it has no values to save")
        if self.slot is not None and full.shape == self.room:
            full = self.slot.resized(full, self.shape)
        empty = full.numel() == 0 and self.slot is None and self.attribute in self.module._parameters
        if full.shape != self.shape or empty:
            raise CheckpointError(
                f"{self.memory!r}: expected the whole tensor of shape {tuple(self.shape)}, found shape "
                f"{tuple(full.shape)}. Its shards were not gathered: pass state_dict= with gathered values"
            )
        return full


def _segments(path: str) -> tuple[str, ...]:
    return tuple(part for part in path.split(".") if part)


@dataclass
class KeyIndex:
    """Every tensor of one adapter by its key in a checkpoint of a wrapped model (``base_model.model. ...``).

    Attributes:
        wrapped: whether this model's own keys have that prefix; those of a bare model do not.
        redundant: keys of layers that use the tensors of a tied layer; they are not read.
        derived: those of them that are written, because readers may not tie: key -> (whose value, transposed).
    """

    wrapped: bool
    targets: dict[str, Target] = field(default_factory=dict)
    redundant: set[str] = field(default_factory=set)
    derived: dict[str, tuple[Target, bool]] = field(default_factory=dict)
    _known: dict[tuple[int, str], Target] = field(default_factory=dict)

    def add(self, target: Target) -> None:
        """Enter a target; a tensor that was entered already (tied layers) gets a further name only.

        Raises:
            CheckpointError: another tensor has the same key, so that one of them would be lost.
        """
        known = self._known.setdefault((id(target.module), target.attribute), target)
        if known is not target:
            if known.key != target.key:
                known.aliases += (target.key,)
            return
        other = self.targets.setdefault(target.key, target)
        if other is not target:
            raise CheckpointError(
                f"{other.memory!r} and {target.memory!r} would both be saved as {target.key!r}; rename a module"
            )

    def holding(self, module: nn.Module, attribute: str) -> Target | None:
        """Return the target that lives at a module's attribute."""
        return self._known.get((id(module), attribute))

    def rendered(self, key: str) -> str:
        """Return a key as this model writes it."""
        return key if self.wrapped or not key.startswith(MODEL_PREFIX) else key[len(MODEL_PREFIX) :]

    def saved(self) -> dict[str, Target]:
        """Return what a checkpoint must hold, by the key that this model writes."""
        return {self.rendered(key): target for key, target in self.targets.items() if target.saved}
