"""Adapters whose makers say themselves what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from inlay.checkpoint.target import KeyIndex, Target
from inlay.checkpoint.tree import Tree

__all__ = ["Translation", "collected", "renamed"]

_OWN = ("slot", "shared", "bias")


class Translation(Protocol):
    """What ``Record.translation`` can do."""

    def collect(self, model: nn.Module, adapter: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what a checkpoint holds, by its keys.

        Args:
            model: what is saved, bare or wrapped.
            adapter: the adapter's name.
            values: tensors by the names of ``model.state_dict()``.
        """
        ...

    def rename(self, model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a checkpoint's tensors by the names of ``model.state_dict()``, what it does not know unchanged."""
        ...


def collected(
    tree: Tree, index: KeyIndex, adapter: str, held: dict[str, Tensor], given: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return what a checkpoint holds, where a translation says it; full copies and the like are as held."""
    translation: Translation | None = tree.state.record(adapter).translation
    if translation is None:
        return held
    values = dict(tree.root.state_dict() if given is None else given)
    others = {key: held[key] for key, target in index.saved().items() if target.part not in _OWN}
    return {**{key: value.detach() for key, value in translation.collect(tree.root, adapter, values).items()}, **others}


def renamed(tree: Tree, index: KeyIndex, adapter: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a checkpoint's tensors by the keys of an index, entering what a translation brings beside its targets."""
    translation: Translation | None = tree.state.record(adapter).translation
    if translation is None:
        return tensors
    keys = {target.memory: key for key, target in index.targets.items()}
    found = {}
    for name, value in translation.rename(tree.root, adapter, dict(tensors)).items():
        if name not in keys:
            owner, _, attribute = name.rpartition(".")
            try:
                holder = tree.root.get_submodule(owner)
            except AttributeError:
                holder = None
            if holder is not None and attribute in {**holder._parameters, **holder._buffers}:
                target = Target(name, holder, attribute, value.shape, name, "slot")
                target.shape = target.tensor.shape
                index.add(target)
                keys[name] = name
        found[keys.get(name, name)] = value
    return found
