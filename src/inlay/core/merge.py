"""Merge adapters into the base weights, transactionally, and take them out again, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.core.affine import LowRank
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.state import State
from inlay.errors import MergeError, StateError
from inlay.parallel.fsdp import settle

__all__ = ["merge", "merge_layers", "unmerge"]


# Wraps the list of work, to show how far it is; yields its items.
Progress = Callable[[Sequence[Any]], Iterable[Any]]


def merge(
    state: State, names: Sequence[str] | None = None, *, keep: str = "copy", progress: Progress | None = None
) -> list[str]:
    """Write adapters into the base weights of every layer that has them; all layers or none.

    Args:
        state: the model's state.
        names: adapters in the order of merging; by default the active ones.
        keep: ``"copy"`` keeps the original weights on the CPU, so that unmerging is bitwise exact and an adapter
            can be switched off while merged; ``"none"`` does not, and cannot be undone.
        progress: wraps the sequence of layers while they are written.

    Returns:
        The names that were merged into at least one layer.

    Raises:
        MergeError: a merged weight would not be finite, an update cannot be written into a weight, or the order of
            merging would change the output.
    """
    names = list(state.active if names is None else names)
    for name in names:
        state.record(name)
    done: list[tuple[Any, list[str], list[str]]] = []  # layer, merged now, merged before
    try:
        for layer in state.layers():
            wanted = [name for name in names if layer.merges_itself and layer.has(name)]
            wanted = [name for name in wanted if name not in layer.merged_names]
            if wanted:
                done.append((layer, wanted, list(layer.merged_names)))
                layer.merge(safe_merge=True, adapter_names=wanted)
        rest = [layer for layer in state.layers() if isinstance(layer, AdaptedLayer) and not layer.merges_itself]
        merged = merge_layers(rest, names, keep=keep, progress=progress)
    except BaseException:
        for layer, _, before in reversed(done):
            if list(layer.merged_names) != before:
                layer.unmerge()
                if before:  # unmerging takes out all
                    layer.merge(adapter_names=before)
        raise
    return [name for name in names if name in merged or any(name in wanted for _, wanted, _ in done)]


def merge_layers(
    layers: Iterable[AdaptedLayer], names: Sequence[str], *, keep: str = "copy", progress: Progress | None = None
) -> list[str]:
    """Merge adapters into some layers, all or none; see :func:`merge`."""
    if keep not in ("copy", "none"):
        raise ValueError(f"keep must be 'copy' or 'none', found {keep!r}")
    settle()
    work: list[tuple[AdaptedLayer, tuple[Entry, ...]]] = []
    for layer in layers:
        wanted = [name for name in names if name in layer.entries and name not in layer._merged]
        chain = tuple(entry for name in wanted for entry in layer.entries[name])
        if chain:
            if layer.state.replication is not None:
                raise MergeError(
                    f"{layer.site.name!r}: layer_replication repeats blocks that share their weights, so no block's "
                    "update can be written into them; unload the adapters, or run them unmerged"
                )
            layer.check_active(wanted)
            _check_order(layer, wanted, chain, keep)
            work.append((layer, chain))
    _check_shared(work)
    proved = {id(layer): _proved_finite(layer, chain) for layer, chain in work}
    if keep == "none":  # nothing will be there to go back to, so every layer is judged before the first is written
        for layer, chain in work:
            if not proved[id(layer)]:
                _merged_finite(layer, chain)
    written: list[tuple[AdaptedLayer, tuple[str, ...], dict[str, Tensor], dict[str, Tensor]]] = []
    tied: dict[int, AdaptedLayer] = {}
    try:
        for layer, chain in work if progress is None else progress(work):
            leaf = layer.leaf_layer
            weight = getattr(leaf, layer.kind.weight_name)
            # layers that share a weight share the update too, and the first has written it
            partner = tied.get(id(weight))
            new: dict[str, Tensor] = {}
            if partner is None:
                new = layer.merged_tensors(chain) if proved[id(layer)] else _merged_finite(layer, chain)
            if layer._merged and not layer._kept:
                kept: dict[str, Tensor] = {}
            elif keep == "copy":
                kept = {name: _copy(getattr(leaf, name)) for name in new} | dict(layer._kept)
            else:
                kept = {}
            if partner is not None and keep == "copy" and (not layer._merged or layer._kept):
                kept = {layer.kind.weight_name: partner._kept[partner.kind.weight_name]} | dict(layer._kept)
            tied[id(weight)] = layer
            before = {}
            if keep == "copy":
                before = {name: _copy(getattr(leaf, name)) if layer._merged else kept[name] for name in new}
            written.append((layer, layer._merged, dict(layer._kept), before))
            merged = (*layer._merged, *dict.fromkeys(entry.name for entry in chain))
            layer.write(new, merged, kept)
    except BaseException:
        for layer, merged, kept, before in reversed(written):
            layer.write(before, merged, kept)
        raise
    return [name for name in names if any(entry.name == name for _, chain in work for entry in chain)]


def unmerge(state: State) -> bool:
    """Put the original weights back, bitwise.

    Returns:
        Whether anything was merged.

    Raises:
        StateError: some layer was merged with ``keep="none"``; nothing is changed then.
    """
    layers = [layer for layer in state.layers() if layer.merged_names]
    for layer in layers:
        if not layer.merges_itself and not layer._kept:
            raise StateError(
                f"{layer.site.name!r}: the original weight was not kept when adapters were merged (keep='none'), so it "
                "cannot be put back exactly"
            )
    settle()
    for layer in layers:
        if layer.merges_itself:
            layer.unmerge()
        else:
            layer.restore()
    return bool(layers)


def _check_shared(work: list[tuple[AdaptedLayer, tuple[Entry, ...]]]) -> None:
    """A weight that several layers hold can take an update only if all of them have it."""
    chains = {id(layer): chain for layer, chain in work}
    for layer, chain in work:
        if not layer.shares:
            continue
        standing = {other.site.owner: other for other in layer.state.layers() if isinstance(other, AdaptedLayer)}
        mine = [(entry.name, id(entry.home or layer)) for entry in chain]
        for path in layer.shares:
            other = standing.get(path)
            theirs = [(entry.name, id(entry.home or other)) for entry in chains.get(id(other), ())]
            if mine != theirs:
                raise MergeError(
                    f"{layer.site.name!r} shares its weight with {path!r}, which does not have the same update, so "
                    "merging would change that layer too; set ensure_weight_tying=True if one is an embedding and the "
                    "other its head, or give the layers weights of their own first"
                )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _check_order(layer: AdaptedLayer, wanted: list[str], chain: tuple[Entry, ...], keep: str) -> None:
    """What is merged goes below what is not: refuse where that would change the output."""
    for entry in chain:
        if not entry.method.mergeable:
            raise MergeError(
                f"{layer.site.name!r}: adapter {entry.name!r} ({type(entry.method).__name__}) depends on the data and "
                "has no weight to merge"
            )
    below: list[Entry] = []
    for name in layer.active:
        if name in layer._merged:
            continue
        if name not in wanted:
            below += layer.entries.get(name, ())
            continue
        for entry in layer.entries.get(name, ()):
            for other in below:
                if not (entry.method.commutes and other.method.commutes):
                    raise MergeError(
                        f"{layer.site.name!r}: {entry.name!r} is active above {other.name!r}, which is not merged, and "
                        f"the two do not commute ({type(entry.method).__name__} over {type(other.method).__name__}); "
                        "merge both, or the lower one first"
                    )
    done = {*wanted, *layer._merged}
    rest = [entry for name in layer.active if name not in done for entry in layer.entries.get(name, ())]
    if keep == "none" and any(not entry.method.additive for entry in rest):
        raise MergeError(
            f"{layer.site.name!r}: an adapter that stays active reads the untouched weight, so it must be kept: "
            "merge with keep='copy'"
        )


def _merged_finite(layer: AdaptedLayer, chain: tuple[Entry, ...]) -> dict[str, Tensor]:
    """Return the merged tensors, proved finite in the stored dtype by looking at each number."""
    leaf = layer.leaf_layer
    new = layer.merged_tensors(chain)
    for name, tensor in new.items():
        stored = getattr(leaf, name)
        rounded = tensor.to(stored.dtype) if stored.dtype.is_floating_point else tensor
        if not bool(torch.isfinite(rounded).all()):
            who = ", ".join(repr(entry.name) for entry in chain)
            raise MergeError(
                f"{layer.site.name!r}: merging {who} gives a {name} that is not finite in {stored.dtype}; no weight of "
                "the model was changed"
            )
    return new


@torch.no_grad()
def _proved_finite(layer: AdaptedLayer, chain: tuple[Entry, ...]) -> bool:
    """Whether max|W| + s |B| |A| stays below the largest number of the stored dtype; False if that does not tell."""
    weight = layer.present_affine(whole=True).weight
    lowest, highest = torch.aminmax(weight)
    bound = torch.maximum(-lowest, highest).double()
    for entry in chain:
        if not entry.method.additive:
            return False
        delta = entry.method.update(entry.site, layer.params(entry, whole=True))
        if not isinstance(delta, LowRank) or delta.groups > 1 or delta.bias is not None:
            return False
        rows = delta.B.double().abs().sum(dim=-1).amax()
        bound = bound + rows * delta.A.abs().amax().double() * abs(float(delta.scale))
    return bool(bound < torch.finfo(weight.dtype).max / 2)
