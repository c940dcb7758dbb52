"""``layer_replication``: a deeper model whose repeated blocks share base weights and have adapters of their own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from inlay.core.state import State
from inlay.errors import ConfigError, UnsupportedError

__all__ = ["Replication", "installed", "replicate", "replication_of"]

# what families call their list of blocks
_LISTS = ("layers", "layer", "h")
# fields of a model's config that count the blocks, or describe them one by one
_COUNTS = ("num_hidden_layers",)
_DESCRIPTIONS = ("layer_types", "mlp_layer_types", "no_rope_layers")


@dataclass(eq=False)
class Replication:
    """A list of blocks and the longer one that stands in for it.

    Attributes:
        ranges: [start, end) pairs, as configured.
        name: attribute under which the list is held.
        original, repeated: the list as it was, and the new one.
        settings: (config, field, value before, value now) of what the model's config says about its blocks.
    """

    ranges: tuple[tuple[int, int], ...]
    name: str
    original: nn.ModuleList
    repeated: nn.ModuleList
    settings: list[tuple[Any, str, Any, Any]]

    def install(self, model: nn.Module) -> None:
        """Put the longer list in."""
        _swap(model, self.name, self.original, self.repeated)
        for config, field, _, now in self.settings:
            setattr(config, field, now)

    def restore(self, model: nn.Module) -> None:
        """Put the original list back."""
        _swap(model, self.name, self.repeated, self.original)
        for config, field, before, _ in self.settings:
            setattr(config, field, before)


@contextmanager
def installed(replication: Replication | None, model: nn.Module) -> Iterator[None]:
    """Show the model as it will be, for as long as it is planned on."""
    if replication is None:
        yield
        return
    replication.install(model)
    try:
        yield
    finally:
        replication.restore(model)


def replication_of(model: nn.Module, config: Any, state: State | None) -> Replication | None:
    """Return the replication that a config asks for and the model does not have yet.

    Raises:
        ConfigError: a range lies outside the model's blocks, or is empty.
        UnsupportedError: the model has no list of blocks, or has adapters that came before.
    """
    wanted = getattr(config, "layer_replication", None)
    if not wanted:
        return None
    ranges = tuple((int(start), int(end)) for start, end in wanted)
    if state is not None and state.replication is not None and state.replication.ranges == ranges:
        return None
    if state is not None and state.records:
        has = "none" if state.replication is None else list(state.replication.ranges)
        raise UnsupportedError(
            f"layer_replication={list(ranges)}: the model has adapters already, planned on its present blocks "
            f"(replication: {has}); the first adapter must bring it"
        )
    if getattr(config, "bias", "none") not in (None, "none"):
        raise UnsupportedError(
            f"layer_replication with bias={config.bias!r}: repeated blocks share their biases, so none of them can "
            "train its own"
        )
    return replicate(model, ranges)


def replicate(model: nn.Module, layer_map: Iterable[tuple[int, int]]) -> Replication:
    """Return the replication that repeats the blocks of [start, end) ranges; the model is not changed yet.

    Raises:
        ConfigError: a range lies outside the model's blocks, or is empty.
        UnsupportedError: the model has no list of blocks.
    """
    ranges = tuple((int(start), int(end)) for start, end in layer_map)
    parent, name, blocks = _blocks(model)
    for start, end in ranges:
        if not 0 <= start < end <= len(blocks):
            raise ConfigError(
                f"layer_replication: expected ranges [start, end) within the {len(blocks)} blocks of {name!r}, found "
                f"({start}, {end})"
            )
    order = [i for start, end in ranges for i in range(start, end)]
    repeated = nn.ModuleList(_repeat(blocks[i], i, place) for place, i in enumerate(order))
    repeated.training = blocks.training
    return Replication(ranges, name, blocks, repeated, _settings(model, parent, len(blocks), order))


def _blocks(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """Return the one list of blocks: its parent, its attribute, the list."""
    found: list[tuple[str, nn.Module, str, nn.ModuleList]] = []
    todo = [("", model)]
    while todo:
        path, module = todo.pop(0)
        for name, child in module._modules.items():
            if child is None:
                continue
            below = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList):
                if name in _LISTS and len(child):
                    found.append((below, module, name, child))
                continue  # lists inside blocks are their own business
            todo.append((below, child))
    if len(found) != 1:
        seen = f"found {', '.join(repr(path) for path, *_ in found)}" if found else "found none"
        raise UnsupportedError(
            f"layer_replication: expected one list of blocks called {', '.join(map(repr, _LISTS))} in "
            f"{type(model).__name__}, {seen}"
        )
    _, parent, name, blocks = found[0]
    return parent, name, blocks


def _repeat(block: nn.Module, index: int, place: int) -> nn.Module:
    """Return a copy of a block that shares every tensor and the model's config, and knows its new place."""
    shared: dict[int, Any] = {}
    for module in block.modules():
        held = [*module._parameters.values(), *module._buffers.values(), module.__dict__.get("config")]
        shared |= {id(thing): thing for thing in held if thing is not None}
    repeated = copy.deepcopy(block, shared)
    for module in repeated.modules():
        if module.__dict__.get("layer_idx") == index:
            module.__dict__["layer_idx"] = place
    return repeated


def _settings(model: nn.Module, parent: nn.Module, count: int, order: list[int]) -> list[tuple[Any, str, Any, Any]]:
    """Return what the configs of the model say about its blocks, before and after."""
    configs = {
        id(config): config for module in (model, parent) if (config := getattr(module, "config", None)) is not None
    }
    changes: list[tuple[Any, str, Any, Any]] = []
    for config in configs.values():
        if isinstance(config, dict):
            continue
        for field in _COUNTS:
            if getattr(config, field, None) == count:
                changes.append((config, field, count, len(order)))
        for field in _DESCRIPTIONS:
            value = getattr(config, field, None)
            if isinstance(value, (list, tuple)) and len(value) == count:
                changes.append((config, field, value, type(value)(value[i] for i in order)))
    return changes


def _swap(model: nn.Module, name: str, old: nn.ModuleList, new: nn.ModuleList) -> None:
    for module in model.modules():
        if module._modules.get(name) is old:
            module._modules[name] = new
            return
