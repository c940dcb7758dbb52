"""What a merge must not do, and is refused for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.errors import MergeError

__all__ = ["check_mergeable", "check_order", "check_shared", "merged_finite", "not_finite"]


def check_mergeable(layer: AdaptedLayer, wanted: Sequence[str], chain: tuple[Entry, ...]) -> None:
    """Refuse adapters that have no weight to merge at a layer, or cannot be on it together.

    Raises:
        MergeError: says why.
        UnsupportedError: the adapters cannot be on a layer together.
    """
    if layer.state.replication is not None:
        raise MergeError(
            f"{layer.site.name!r}: layer_replication repeats blocks that share their weights, so no block's update can "
            "be written into them; unload the adapters, or run them unmerged"
        )
    layer.check_active(wanted)
    for entry in chain:
        if not entry.method.mergeable:
            raise MergeError(
                f"{layer.site.name!r}: adapter {entry.name!r} ({type(entry.method).__name__}) depends on the data and "
                "has no weight to merge"
            )


def check_order(layer: AdaptedLayer, wanted: Sequence[str], keep: str) -> None:
    """What is merged goes below what is not: refuse where that would change the output.

    Raises:
        MergeError: says why.
    """
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


def check_shared(work: list[tuple[AdaptedLayer, tuple[Entry, ...]]]) -> None:
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


def merged_finite(layer: AdaptedLayer, chain: tuple[Entry, ...]) -> dict[str, Tensor]:
    """Return the merged tensors, proved finite in the stored dtype by looking at each number."""
    leaf = layer.leaf_layer
    new = layer.merged_tensors(chain)
    for name, tensor in new.items():
        stored = getattr(leaf, name)
        rounded = tensor.to(stored.dtype) if stored.dtype.is_floating_point else tensor
        if not bool(torch.isfinite(rounded).all()):
            raise not_finite(layer, chain, name, stored.dtype)
    return new


def not_finite(layer: AdaptedLayer, chain: tuple[Entry, ...], name: str, dtype: torch.dtype) -> MergeError:
    """Return the error for a merged tensor that is not finite."""
    who = ", ".join(repr(entry.name) for entry in chain)
    return MergeError(
        f"{layer.site.name!r}: merging {who} gives a {name} that is not finite in {dtype}; no weight of the model was "
        "changed"
    )
