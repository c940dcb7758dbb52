"""A file that has every tensor of a new adapter by its present name, and nothing else, as nearly every file does.

Such a file needs neither the index of all keys nor the rules for older names: those are some ten calls for each tensor,
and an adapter has hundreds. Anything unusual is left to ``checkpoint.state_dict``, which also finds the words for what
does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from inlay.checkpoint.keys import slot_holder
from inlay.checkpoint.tree import MODEL_PREFIX
from inlay.checkpoint.write import Pairs, copies_alone
from inlay.core.follow import Follower
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.state import State

__all__ = ["exact_pairs"]


def exact_pairs(state: State, adapter: str, tensors: Mapping[str, Tensor]) -> Pairs | None:
    """Return (tensor of the model, value) for all of a file, or None where not everything is as it is written today.

    Args:
        state: the adapter's state.
        adapter: one that came just now, so that its sites say where its layers stand.
        tensors: what the file holds.
    """
    record = state.record(adapter)
    method = type(record.method)
    if (
        record.shared
        or record.translation is not None
        or record.method.bias_mode() != "none"
        or method.unpack is not Method.unpack
        or method.borrows is not Method.borrows
    ):
        return None
    pairs: Pairs = []
    known: dict[int, list[tuple[str, tuple[str, ...], str, tuple[int, ...]]]] = {}
    for layer in state.layers():
        if not isinstance(layer, AdaptedLayer) or type(layer).saved_tensors is not Follower.saved_tensors:
            return None
        entries = layer.entries.get(adapter, ())
        if not entries:
            continue
        entry = entries[0]
        if entry.method is not record.method or len(entries) > 1 or entry.home is not None or entry.room:
            return None  # parts of a layer, tied layers, places for several adapters
        if layer.site.parameter is not None:
            return None
        expected = known.get(id(entry.places))  # one object for all sites that the method treats alike
        if expected is None:
            slots = entry.method.slots(entry.site)
            if not all(slot.saved for slot in slots.values()):
                return None
            expected = known[id(entry.places)] = [
                (slots[role].disk_name, containers, leaf, slots[role].shape) for role, containers, leaf in entry.places
            ]
        above = f"{MODEL_PREFIX}{entry.site.name}."
        for name, containers, leaf, shape in expected:
            value = tensors.get(above + name)
            if value is None or value.shape != shape:
                return None
            holder: nn.Module
            holder, attribute = slot_holder(layer, adapter, containers, leaf)
            held: Any = holder._parameters.get(attribute)
            if held is None or not copies_alone(held, value):
                return None
            pairs.append((held, value))
    # Each key is of one place, so as many pairs as keys means that each was used once.
    return pairs if len(pairs) == len(tensors) and _apart(pairs) else None


def _apart(pairs: Pairs) -> bool:
    """Whether no value is written twice."""
    return len({id(value) for _, value in pairs}) == len(pairs)
