"""The weights that a model with adapters amounts to, one tensor at a time; the model itself is only read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inlay.checkpoint.state_dict import get_peft_model_state_dict
from inlay.checkpoint.tree import Tree, persistent_tensors
from inlay.core import storage
from inlay.core.entry import Entry
from inlay.core.follow import follower_of
from inlay.core.layer import AdaptedLayer
from inlay.core.merge_bound import is_finite
from inlay.core.merge_rows import add_low_rank, low_rank_updates
from inlay.core.merge_rules import check_mergeable, check_shared, merged_finite, not_finite
from inlay.core.mount import ModuleCopies
from inlay.core.state import State
from inlay.errors import ConfigTypeError, MergeError, StateError
from inlay.parallel.tensors import gather

__all__ = ["Change", "adapter_tensors", "changes", "iter_merged", "merged_value"]


def adapter_tensors(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """Return an adapter's tensors by the keys of its checkpoint, for syncing it alone; nothing is copied.

    Args:
        model: a model with adapters, wrapped or bare; the keys of a bare one have no ``base_model.model.``.
        adapter: its name, which is not part of the keys.

    Returns:
        Whole tensors without gradient that share memory with the model where it holds them whole: later steps of an
        optimiser show in them. Sharded ones are gathered, so every process must call this.

    Raises:
        StateError: the model has no adapters.
        UnknownAdapterError: it has no adapter of that name.
        CheckpointError: a tensor is on the meta device, or is a shard that cannot be gathered here.
    """
    return get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def iter_merged(
    model: nn.Module, adapters: str | Iterable[str] | None = None, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the merged model one after the other, and leave the model as it is.

    Names and order are those of the base model's own ``state_dict()`` before adapters came, buffers included; a tensor
    that has several names (tied weights) comes once, under the first. A merged weight is a new tensor; every other one
    shares memory with the model unless it has to be gathered, read from a quantised form or cast. So beside the model
    there is memory for one tensor (where the method is not low-rank, for a few of the largest layer's size), and a
    forward pass may run at the same time. A full copy (``modules_to_save``) comes in the place of its module.

    What cannot be merged is refused by this call, before the first tensor; values are read as they are when their turn
    comes. Where tensors are sharded, every process must iterate.

    Args:
        model: a model with adapters, wrapped or bare.
        adapters: name or names, in the order of merging; by default the active ones. What is merged into the model
            must be among them.
        dtype: of the floating tensors; by default each keeps its own. Merged ones are rounded once, to this dtype.

    Raises:
        StateError: the model has no adapters; while iterating, a tensor is on the meta device.
        UnknownAdapterError: there is no such adapter.
        MergeError: an adapter cannot be written into a weight, other adapters are merged already, or layers that share
            a weight do not share its update; while iterating, a merged weight would not be finite.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigTypeError(f"dtype: expected a floating dtype such as torch.bfloat16, found {dtype}")
    tree = Tree(model)
    names = list(tree.state.active) if adapters is None else [adapters] if isinstance(adapters, str) else list(adapters)
    return _tensors(list(changes(tree, names)), dtype)


@dataclass
class _Plan:
    """What is to be added to one layer's weight, and tensors that were computed with it and have yet to be yielded."""

    layer: AdaptedLayer
    chain: tuple[Entry, ...]
    waiting: dict[str, Tensor] = field(default_factory=dict)


def _plans(state: State, names: list[str]) -> dict[tuple[int, str], _Plan]:
    """Return what changes, by module and name of the tensor.

    Raises:
        MergeError: says what stands against it.
    """
    for name in names:
        state.record(name)
    work: list[tuple[AdaptedLayer, tuple[Entry, ...]]] = []
    for layer in state.layers():
        here = [name for name in names if layer.has(name)]
        for name in layer.merged_names:
            if name not in names:
                raise MergeError(
                    f"{layer.site_path!r}: adapter {name!r} is merged into the weight; unmerge it, or name it among "
                    "the adapters"
                )
        if layer.merges_itself and set(here) - set(layer.merged_names):
            raise MergeError(
                f"{layer.site_path!r} ({layer.type_name}) merges adapters in a way of its own, which writes to the "
                "model; merge the model and read its state_dict"
            )
        if not isinstance(layer, AdaptedLayer) or layer.merges_itself:
            continue
        if tuple(here[: len(layer.merged_names)]) != layer.merged_names:
            _check_commute(layer, here)
        wanted = [name for name in here if name not in layer.merged_names]
        chain = tuple(entry for name in wanted for entry in layer.entries[name])
        if chain:
            check_mergeable(layer, wanted, chain)
            work.append((layer, chain))
    check_shared(work)
    found: dict[tuple[int, str], _Plan] = {}
    for layer, chain in work:
        plan = _Plan(layer, chain)
        found[id(layer.leaf_layer), layer.kind.weight_name] = plan
        if layer.site.bias:
            found[id(layer.leaf_layer), layer.kind.bias_name] = plan
    return found


def _check_commute(layer: AdaptedLayer, names: list[str]) -> None:
    if all(entry.method.commutes for name in names for entry in layer.entries[name]):
        return
    raise MergeError(
        f"{layer.site.name!r}: {', '.join(layer.merged_names)} is merged below what is named before it, and the order "
        "matters to these methods; unmerge first"
    )


@dataclass
class Change:
    """What stands for one tensor of the base model.

    Attributes:
        module, attribute: where the tensor is; in a full copy where there is one.
        plan: what is to be added to it, if anything is.
        original: the tensor that a full copy stands for.
    """

    module: nn.Module
    attribute: str
    plan: _Plan | None = None
    original: Tensor | None = None

    @property
    def held(self) -> Tensor:
        """The tensor as the model has it."""
        held = self.module._parameters.get(self.attribute)
        # a buffer may be None in general; this one's name was read from the module's tensors
        return self.module._buffers[self.attribute] if held is None else held  # type: ignore[return-value]


def changes(tree: Tree, names: list[str]) -> Iterator[tuple[str, Change]]:
    """Iterate over every tensor of the base model by name, with what the adapters ``names`` make of it.

    Raises:
        MergeError, UnknownAdapterError: they cannot be merged; before the first tensor.
    """
    plans = _plans(tree.state, names)
    covered: set[int] = set()
    for node in tree.nodes:
        module = node.module
        if id(module) in covered:
            continue
        if isinstance(module, ModuleCopies):
            copies = module.modules_to_save._modules
            chosen = next((copies[name] for name in reversed(names) if name in copies), None)
            if chosen is not None:
                covered.update(map(id, module.original_module.modules()))
                originals = {name: getattr(o, a) for name, o, a in persistent_tensors(module.original_module)}
                for name, owner, attribute in persistent_tensors(chosen):
                    yield _dotted(node.original, name), Change(owner, attribute, None, originals.get(name))
            continue
        if follower_of(module) is not None:
            continue
        buffers = [name for name in module._buffers if name not in module._non_persistent_buffers_set]
        if storage.storage_of(module) is not storage.PLAIN:
            buffers = []  # what the storage itself keeps
        for name in (*module._parameters, *buffers):
            change = Change(module, name, plans.get((id(module), name)))
            if module._parameters.get(name) is not None or module._buffers.get(name) is not None:
                yield _dotted(node.original, name), change


def _tensors(found: Iterable[tuple[str, Change]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for name, change in found:
        if id(change.held) not in seen:
            seen.add(id(change.held))
            yield name, merged_value(name, change, dtype)


def _dotted(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@torch.no_grad()
def merged_value(name: str, change: Change, dtype: torch.dtype | None) -> Tensor:
    """Return one tensor of the merged model, whole.

    Args:
        name: what the base model calls it, for messages.
        change: from :func:`changes`.
        dtype: of the result where it is floating; by default that of the stored tensor.

    Raises:
        StateError: it is on the meta device.
        MergeError: it would not be finite.
    """
    with storage.onloaded(change.module):
        return _value(name, change.module, change.attribute, change.plan, dtype)


def _value(name: str, module: nn.Module, attribute: str, plan: _Plan | None, dtype: torch.dtype | None) -> Tensor:
    plain = storage.storage_of(module) is storage.PLAIN
    whole = gather(getattr(module, attribute) if plain else storage.read(module, attribute))
    if whole.is_meta:
        raise StateError(f"{name!r} is on the meta device: it has no values to yield")
    if not whole.is_floating_point():
        return whole
    wanted = dtype or whole.dtype
    if plan is None:
        return whole.to(wanted)
    merged = None
    if attribute == plan.layer.kind.weight_name:
        merged = _low_rank(plan, whole, wanted)
        if merged is None:
            plan.waiting = merged_finite(plan.layer, plan.chain)
    if merged is None and attribute in plan.waiting:
        merged = plan.waiting.pop(attribute).to(wanted).contiguous()
    if merged is None:
        return whole.to(wanted)
    if not is_finite(merged):
        raise not_finite(plan.layer, plan.chain, attribute, wanted)
    return merged


def _low_rank(plan: _Plan, whole: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the merged weight where only low-rank updates are added to it; None elsewhere."""
    layer = plan.layer
    updates = low_rank_updates(layer, plan.chain)
    if updates is None:
        return None
    matrix = layer.kind.view(layer.leaf_layer, layer.site, whole, None).weight
    if matrix.data_ptr() != whole.data_ptr() or matrix.dim() not in (2, 3):
        return None  # the kind reads it changed, or not as one matrix
    result = torch.empty_like(whole, dtype=dtype, memory_format=torch.contiguous_format)
    add_low_rank(matrix, updates, layer.kind.to_matrix(layer.site, result))
    return result
