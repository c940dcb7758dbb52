"""The write of a hot swap: everything is checked and made ready before the first tensor is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from inlay.checkpoint.embeddings import embedding_targets
from inlay.checkpoint.keys import key_index, slot_holder
from inlay.checkpoint.rank import Sized, entries_of, renewed, successor, with_rank
from inlay.checkpoint.resolve import Resolution, resolve
from inlay.checkpoint.target import KeyIndex, Target
from inlay.checkpoint.tree import Tree, persistent_tensors
from inlay.checkpoint.write import staged, write_staged
from inlay.core.dtype import merge_dtype
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.mount import ModuleCopies
from inlay.errors import CheckpointError, CheckpointMismatchError, MergeError
from inlay.parallel.tensors import gather, scatter

__all__ = ["replace_adapter"]


@dataclass
class _Swap:
    """What a swap is going to write.

    Attributes:
        methods: entries with the methods that they are to have.
        sized: tensors whose rank may change, with their values.
        plain: all other tensors, with theirs.
        fresh: entries whose method is to set what the file does not say (the magnitudes of DoRA).
    """

    methods: list[tuple[Entry, Method]] = field(default_factory=list)
    sized: list[tuple[Sized, Tensor]] = field(default_factory=list)
    plain: list[tuple[Target, Tensor]] = field(default_factory=list)
    fresh: list[tuple[AdaptedLayer, Entry]] = field(default_factory=list)


def replace_adapter(tree: Tree, adapter: str, config: Any, tensors: Mapping[str, Tensor], where: str = "") -> None:
    """Write another adapter's tensors, rank and scale over an adapter; see ``checkpoint.hotswap``.

    Args:
        where: what error messages start with.

    Raises:
        CheckpointMismatchError: keys or shapes do not fit.
        MergeError: the adapter is merged. In each case the model is as before.
    """
    state, record = tree.state, tree.state.record(adapter)
    for layer in state.layers():
        if adapter in layer.merged_names:
            raise MergeError(f"adapter {adapter!r} is merged into {layer.site_path!r}; unmerge it before swapping it")
    index = key_index(tree, adapter)
    try:
        found = resolve(index, tensors, adapter, embedding_targets(tree))
    except CheckpointError as error:
        raise type(error)(f"{where}{error}") from None
    new = renewed(record.method, with_rank(record.method.config, config))
    swap = _planned(tree, adapter, index, found, new, where)
    if state.fixed is not None:
        state.fixed.release(state, adapter)  # its tensors may get another rank
    _apply(tree, swap)
    record.method = new
    record.saved = {}
    shown = with_rank(record.config, config)
    held = tree.bare.__dict__.get("peft_config")
    if isinstance(held, dict) and adapter in held:
        held[adapter] = shown
    record.config = shown
    state.touch()


def _planned(tree: Tree, adapter: str, index: KeyIndex, found: Resolution, new: Method, where: str) -> _Swap:
    """Return what to write, in the model's shapes, dtypes and devices."""
    given = {target: value for target, (_, value) in {**found.found, **found.misshaped}.items()}
    names = {target: key for target, (key, _) in {**found.found, **found.misshaped}.items()}
    swap = _Swap()
    problem = Resolution(unexpected=found.unexpected)
    seen: set[Target] = set()
    for layer, entry in entries_of(tree.state, adapter):
        method = successor(entry.method, new)
        reason = method.refuse(entry.site)
        if reason is not None:
            raise CheckpointMismatchError(f"{where}{entry.site.name!r}: {reason}")
        swap.methods.append((entry, method))
        if entry.home is not None:
            continue
        slots = method.slots(entry.site)
        for role, containers, leaf in entry.places:
            target = index.holding(*slot_holder(layer, adapter, containers, leaf))
            slot = slots[role]
            if target is None or "r" not in slot.dims:
                continue
            seen.add(target)
            value = given.get(target)
            if value is not None and not slot.fits(value.shape):
                target.shape = torch.Size(slot.shape)  # what the message is to say
                problem.misshaped[target] = (names[target], value)
                continue
            held = target.tensor
            room = tuple(max(have, wanted) for have, wanted in zip(held.shape, slot.shape, strict=True))
            one = Sized(layer, entry, role, slot, room)
            largest = None if tree.state.fixed is None else tree.state.fixed.max_rank
            rank = slot.shape[slot.dims.index("r")]
            if largest is not None and rank > largest:
                raise CheckpointMismatchError(
                    f"{where}{entry.site.name!r}: {slot.key!r} has rank {rank}, and the model was "
                    f"prepared for {largest}; give prepare_for_compile a larger max_rank"
                )
            if room != tuple(held.shape) and tree.state.policy.strict_load and _prepared(entry):
                raise CheckpointMismatchError(
                    f"{where}{entry.site.name!r}: the model has room for {slot.key!r} of shape {tuple(held.shape)}, "
                    f"found {slot.shape}; give prepare_model_for_compiled_hotswap the largest rank before compiling"
                )
            one.check()
            swap.sized.append((one, _sized_value(one, value)))
    for target, (key, value) in found.misshaped.items():
        if target not in seen:
            problem.misshaped[target] = (key, value)
    text = problem.problem(index)
    if text is not None:
        raise CheckpointMismatchError(f"{where}the checkpoint cannot replace adapter {adapter!r}: {text}")
    swap.plain = [(target, staged(target, value)) for target, value in given.items() if target not in seen]
    missing = [target for target in found.missing if target not in seen]
    swap.plain += _defaults(tree, adapter, index, missing)
    swap.fresh = list(_fresh(tree, adapter, index, missing))
    return swap


def _prepared(entry: Entry) -> bool:
    return isinstance(entry.options.get("scaling"), Tensor)


@torch.no_grad()
def _sized_value(one: Sized, value: Tensor | None) -> Tensor:
    held = one.tensor
    if value is None:
        whole = torch.zeros(one.room, dtype=held.dtype, device=held.device)
    else:
        whole = one.slot.resized(gather(value), one.room)
    return scatter(whole, held) if tuple(held.shape) == one.room else whole


def _defaults(tree: Tree, adapter: str, index: KeyIndex, missing: list[Target]) -> Iterator[tuple[Target, Tensor]]:
    """Yield values for what the new adapter lacks and no method sets: the base's own, or zeros."""
    lacking = set(missing)
    for layer in tree.state.layers():
        copy = layer.modules_to_save._modules.get(adapter) if isinstance(layer, ModuleCopies) else None
        if copy is None:
            continue
        original = {
            name: getattr(owner, attribute) for name, owner, attribute in persistent_tensors(layer.original_module)
        }
        for name, owner, attribute in persistent_tensors(copy):
            target = index.holding(owner, attribute)
            if target in lacking and name in original:
                yield target, staged(target, original[name])
    for target in missing:
        if target.part == "bias":
            value = tree.state.base_values.get(tree.owner_name(target.tensor) or "")
            if value is not None:
                yield target, staged(target, value)
        elif target.part == "slot":
            yield target, torch.zeros_like(target.tensor)


def _fresh(tree: Tree, adapter: str, index: KeyIndex, missing: list[Target]) -> Iterator[tuple[AdaptedLayer, Entry]]:
    lacking = set(missing)
    for layer in tree.state.layers():
        for entry in layer.entries.get(adapter, ()) if isinstance(layer, AdaptedLayer) else ():
            if entry.home is not None or not entry.method.needs_base:
                continue
            places = [(containers, leaf) for _, containers, leaf in entry.places]
            if any(index.holding(*slot_holder(layer, adapter, *place)) in lacking for place in places):
                yield layer, entry


@torch.no_grad()
def _apply(tree: Tree, swap: _Swap) -> None:
    for entry, method in swap.methods:
        entry.method = method
        for option, value in method.options(entry.site).items():
            number = entry.options.get(option)
            if isinstance(number, Tensor):
                number.fill_(value)  # compiled code may hold the tensor itself
            else:
                entry.set(option, value)
    for one, value in swap.sized:
        one.write(value)
    for target, value in swap.plain:
        write_staged(tree, target, value)
    for layer, entry in swap.fresh:
        base = layer.base_affine(whole=True)
        p = layer.params(entry, whole=True)
        entry.method.prepare(entry.site, p, base.to(merge_dtype(base.weight.dtype)))
        layer.put(entry, p)
