"""Slots to checkpoint keys and back.

Keys are rendered from slots and mounts while walking the live tree, so adapters and modules may have any name. The
index of all rendered keys is the inverse: a key means the tensor that renders to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from inlay.checkpoint.target import KeyIndex, Target
from inlay.checkpoint.tree import MODEL_PREFIX, ROOT_PREFIX, Node, Tree, persistent_tensors
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.mount import ModuleCopies
from inlay.core.sliced import own_method
from inlay.core.slot import Slot

__all__ = ["adapter_slots", "base_target", "foreign_biases", "key_index", "slot_holder"]


def adapter_slots(model: nn.Module, adapter: str = "default") -> dict[str, Target]:
    """Return where every tensor of an adapter's checkpoint goes, by key.

    Raises:
        StateError: the model has no adapters.
        UnknownAdapterError: it has no adapter of that name.
        CheckpointError: two tensors would have one key.
    """
    return key_index(Tree(model), adapter).saved()


def key_index(tree: Tree, adapter: str) -> KeyIndex:
    """Return the index of one adapter's tensors, those that are not saved included."""
    tree.state.record(adapter)
    index = KeyIndex(tree.wrapped)
    for find in (_slots, _written, _shared, _biases, _copies):
        for target in find(tree, adapter):
            index.add(target)
    _add_tied(index, tree, adapter)
    if type(tree.state.record(adapter).method).borrows is not Method.borrows:
        _add_lent(index, tree, adapter)
    _add_repeated(index, tree, adapter)
    return index


def _slots(tree: Tree, adapter: str) -> Iterator[Target]:
    known: dict[Any, dict[str, _Names]] = {}  # by what a method treats alike: few of hundreds of layers differ
    for node in tree.nodes:
        layer = node.module
        if not isinstance(layer, AdaptedLayer):
            continue
        for entry in layer.entries.get(adapter, ()):
            if entry.home is not None:
                continue
            alike = (entry.method, entry.method.alike(entry.site))
            named = known.get(alike)
            if named is None:
                slots = entry.method.slots(entry.site)
                named = known[alike] = {role: _Names(slot, adapter) for role, slot in slots.items()}
            yield from _entry_slots(node, layer, entry, named)


class _Names:
    """What one slot of an adapter is called, below its layer."""

    __slots__ = ("after", "before", "depth", "disk", "memory", "plain", "same", "shape", "slot")

    def __init__(self, slot: Slot, adapter: str) -> None:
        self.slot = slot
        self.shape = torch.Size(slot.shape)
        self.disk = slot.disk_name
        self.plain = slot.key.replace(".*", "").replace("*.", "")  # as PEFT names most tensors
        self.before, _, self.after = slot.key.rpartition("*")
        self.memory = slot.memory_name(adapter)
        self.depth = len(slot.place[0])
        self.same = self.plain == self.disk


def _add_lent(index: KeyIndex, tree: Tree, adapter: str) -> None:
    """Add the keys of layers whose tensors are those of another layer; a checkpoint has them under each name."""
    for node in tree.nodes:
        for entry in node.module.entries.get(adapter, ()) if isinstance(node.module, AdaptedLayer) else ():
            slots = entry.method.slots(entry.site)
            for role, containers, leaf in entry.places:
                held = index.holding(*slot_holder(node.module, adapter, containers, leaf))
                key = f"{MODEL_PREFIX}{_dotted(node.path, slots[role].disk_name)}"
                if held is not None and held.key != key and key in held.aliases:
                    index.redundant.add(key)
                    index.derived[key] = (held, False)


def _add_tied(index: KeyIndex, tree: Tree, adapter: str) -> None:
    """Add the keys of layers that use the tensors of another layer, which has them under its own name.

    A low-rank update of a layer that sees its weight the other way round (an output head tied to an embedding) has
    both factors swapped and transposed.
    """
    for node in tree.nodes:
        for entry in node.module.entries.get(adapter, ()) if isinstance(node.module, AdaptedLayer) else ():
            if entry.home is None:
                continue
            slots = entry.method.slots(entry.site)
            keys = {role: f"{MODEL_PREFIX}{_dotted(node.path, slot.disk_name)}" for role, slot in slots.items()}
            index.redundant.update(keys.values())
            home = entry.home
            if not isinstance(home, AdaptedLayer) or slots.keys() != {"A", "B"}:
                continue
            turned = entry.site.lookup != home.site.lookup
            other = {"A": "B", "B": "A"} if turned else {"A": "A", "B": "B"}
            for role, containers, leaf in entry.places:
                source = index.holding(*slot_holder(home, adapter, containers, leaf))
                if source is not None:
                    index.derived[keys[other[role]]] = (source, turned)


def _add_repeated(index: KeyIndex, tree: Tree, adapter: str) -> None:
    """Let shared tensors be read from the layers that use them too, where PEFT writes some of them once more."""
    for node in tree.nodes:
        for entry in node.module.entries.get(adapter, ()) if isinstance(node.module, AdaptedLayer) else ():
            for _, containers, leaf in entry.shared:
                target = index.holding(*slot_holder(tree.state.shared, adapter, containers, leaf))
                if target is not None:
                    target.aliases += (f"{MODEL_PREFIX}{_dotted(node.path, target.key.removeprefix(ROOT_PREFIX))}",)


def _entry_slots(node: Node, layer: AdaptedLayer, entry: Entry, named: dict[str, _Names]) -> Iterator[Target]:
    base = layer.leaf_layer
    weight: Any = base._parameters.get(layer.kind.weight_name)
    if weight is None:
        weight = getattr(base, layer.kind.weight_name, None)
    device = None if weight is None else weight.device
    memory = f"{node.memory}." if node.memory else ""
    path = f"{MODEL_PREFIX}{node.path}." if node.path else MODEL_PREFIX
    for role, containers, leaf in entry.places:
        names = named[role]
        mounted = containers[: len(containers) - names.depth]  # what a mount puts above the slot's own names
        between = ".".join(mounted) + "." if mounted else ""
        holder, attribute = slot_holder(layer, entry.name, containers, leaf)
        target = _target(names, path + between, memory + between, holder, attribute, "slot", device)
        target.slot = names.slot
        if entry.room and role in entry.room:
            target.room = torch.Size(entry.room[role])
        yield target


def slot_holder(home: nn.Module, adapter: str, containers: tuple[str, ...], leaf: str) -> tuple[nn.Module, str]:
    """Return the module that holds the tensor at a slot's place below ``home``, and the tensor's name there."""
    if leaf and "." not in leaf and len(containers) == 1:  # the usual case: a model has thousands of tensors
        owner: Any = home._modules[containers[0]]
        return owner._modules[adapter], leaf
    path, attribute = list(containers), adapter
    if leaf:
        *below, attribute = leaf.split(".")
        path += [adapter, *below]
    holder: Any = home
    for part in path:
        holder = holder._modules[part]
    return holder, attribute


def _target(
    names: _Names, above: str, memory: str, holder: nn.Module, attribute: str, part: str, device: torch.device | None
) -> Target:
    """Return the target of a slot, with what stands before its names in a checkpoint and in memory."""
    key = above + names.disk
    same = names.same
    around = (above + names.before, names.after)
    return Target(
        key,
        holder,
        attribute,
        names.shape,
        memory + names.memory,
        part,
        names.slot.saved,
        () if same else (above + names.plain,),
        (around,) if same else (around, (key, "")),
        device,
    )


def _written(tree: Tree, adapter: str) -> Iterator[Target]:
    """Tensors of layers that others wrote, and of a tuner around the model; they say what a checkpoint calls them."""
    for follower in tree.state.layers():
        saved = list(follower.saved_tensors(adapter))
        if not saved:
            continue
        node = tree.node(follower.standing)
        above = ROOT_PREFIX if node is None else f"{MODEL_PREFIX}{_dotted(node.path, '')}"
        memory = (ROOT_PREFIX if tree.wrapped else "") if node is None else _dotted(node.memory, "")
        covered = None if node is None else node.module._modules.get(follower.base_attribute)
        base = None if covered is None else next(covered.parameters(), None)
        for name, holder, attribute in saved:
            key = follower.disk_key(f"{above}{name}", adapter)
            target = Target(key, holder, attribute, torch.Size(()), f"{memory}{name}", "slot")
            target.shape = target.tensor.shape
            target.device = None if base is None else base.device
            parts = name.split(".")
            if adapter in parts:
                place = parts.index(adapter)
                target.around = ((f"{above}{'.'.join(parts[:place])}", ".".join(parts[place + 1 :])),)
            yield target


def _shared(tree: Tree, adapter: str) -> Iterator[Target]:
    """Tensors that all layers share."""
    for slot in tree.state.records[adapter].shared.values():
        holder, attribute = slot_holder(tree.state.shared, adapter, *slot.place)
        memory = ROOT_PREFIX if tree.wrapped else ""
        device = _first_device(tree, adapter)
        target = _target(_Names(slot, adapter), ROOT_PREFIX, memory, holder, attribute, "shared", device)
        target.aliases += (f"{MODEL_PREFIX}{target.key}",)  # as transformers saves a model with injected adapters
        yield target


def _first_device(tree: Tree, adapter: str) -> torch.device | None:
    for layer in tree.state.layers():
        if isinstance(layer, AdaptedLayer) and adapter in layer.entries:
            weight = getattr(layer.leaf_layer, layer.kind.weight_name, None)
            return None if weight is None else weight.device
    return None


def _biases(tree: Tree, adapter: str) -> Iterator[Target]:
    """Base biases that train with the adapter."""
    method = tree.state.records[adapter].method
    mode = method.bias_mode()
    if mode == "none":
        return
    adapted: set[int] = set()
    for node in tree.nodes:
        if isinstance(node.module, AdaptedLayer) and any(
            own_method(entry.method) is method and entry.site.parameter is None
            for entry in node.module.entries.get(adapter, ())
        ):
            adapted.add(id(node.module.get_base_layer()))
    for node in tree.nodes:
        bias = node.module._parameters.get("bias")
        if bias is not None and (mode == "all" or id(node.module) in adapted):
            yield base_target(node, "bias", "bias")


def foreign_biases(tree: Tree, index: KeyIndex) -> list[Target]:
    """Return the base biases that do not train with the adapter; a file may hold them even so."""
    return [
        base_target(node, "bias", "embedding")  # as embeddings: given back when the adapters are unloaded
        for node in tree.nodes
        if node.module._parameters.get("bias") is not None and index.holding(node.module, "bias") is None
    ]


def base_target(node: Node, attribute: str, part: str) -> Target:
    """Return the target for a tensor of the base model."""
    target = Target("", node.module, attribute, torch.Size(()), _dotted(node.memory, attribute), part)
    target.key = f"{MODEL_PREFIX}{_dotted(node.path, attribute)}"
    target.shape = target.tensor.shape
    if node.original != node.path:
        target.aliases = (f"{MODEL_PREFIX}{_dotted(node.original, attribute)}",)
    return target


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _copies(tree: Tree, adapter: str) -> Iterator[Target]:
    """Full copies of modules (``modules_to_save``)."""
    for node in tree.nodes:
        if not isinstance(node.module, ModuleCopies):
            continue
        copy = node.module.modules_to_save._modules.get(adapter)
        if copy is None:
            continue
        original = {
            name: (owner, attribute) for name, owner, attribute in persistent_tensors(node.module.original_module)
        }
        for name, owner, attribute in persistent_tensors(copy):
            target = Target(
                f"{MODEL_PREFIX}{_dotted(node.path, name)}",
                owner,
                attribute,
                torch.Size(()),
                _dotted(node.memory, f"modules_to_save.{adapter}.{name}"),
                "copy",
                aliases=(f"{MODEL_PREFIX}{_dotted(node.path, 'modules_to_save')}.{name}",),
                around=((f"{MODEL_PREFIX}{_dotted(node.path, 'modules_to_save')}", name),),
            )
            target.shape = target.tensor.shape
            if name in original:
                held, attribute = original[name]
                of_base = held._parameters.get(attribute)
                target.device = None if of_base is None else of_base.device
            yield target
