"""Constants that an adapter takes from the base weights when it comes; see ``core.rebase`` for initial values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from inlay.core.affine import Affine, Site
from inlay.core.dtype import merge_dtype
from inlay.core.entry import Entry, find_tensor
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method, P
from inlay.core.sliced import as_seen, own_method
from inlay.core.slot import Slot
from inlay.core.state import State
from inlay.parallel.tensors import gather

if TYPE_CHECKING:
    from inlay.core.kind import Kind
    from inlay.core.plan import Placement, Plan
    from inlay.core.targets import Place

__all__ = ["Undo", "derive", "derive_loaded", "derives", "standing", "untouched", "wide_base"]

# One step back, should a later step of an injection fail.
Undo = Callable[[], object]


def standing(placement: Placement) -> AdaptedLayer | None:
    """Return the adapted layer at a place, from an earlier adapter or an earlier placement of this plan."""
    parent, name = placement.place.parents[0]
    layer = parent._modules[name]
    while isinstance(layer, AdaptedLayer):
        if layer.site.parameter == placement.site.parameter:
            return layer
        layer = layer.base_layer
    return None


def wide_base(layer: AdaptedLayer) -> Affine:
    """Return the untouched map of a layer, whole, in a dtype in which sums are exact enough to be rounded once."""
    base = layer.base_affine(whole=True)
    return base.to(merge_dtype(base.weight.dtype))


def untouched(place: Place, kind: Kind, site: Site) -> Affine:
    """Return the same of a layer that may have no adapter yet."""
    layer = place.module
    while isinstance(layer, AdaptedLayer):
        if layer.site.parameter == site.parameter:
            return wide_base(layer)
        layer = layer.base_layer
    base = kind.read(place.base, site)
    base = Affine(gather(base.weight.detach()), None if base.bias is None else gather(base.bias.detach()))
    return base.to(merge_dtype(base.weight.dtype))


Held = list[tuple[AdaptedLayer, Entry]]


def _planned(plan: Plan) -> Held:
    """Return the layers of a plan that have tensors of their own, with what the plan's adapter has there."""
    found: Held = []
    for placement in plan.placements:
        if placement.source is not None:
            continue
        layer = standing(placement)
        assert layer is not None
        found += [(layer, entry) for entry in layer.entries[plan.adapter] if entry.method is placement.method]
    return [one for one in found if _readable(*one)]


def _readable(layer: AdaptedLayer, entry: Entry) -> bool:
    weight = getattr(layer.leaf_layer, layer.kind.weight_name)
    return entry.home is None and weight.device.type != "meta"


def derive(plan: Plan, state: State, initial: bool) -> None:
    """Let methods set the constants that follow from the base weights and that no checkpoint holds.

    Args:
        initial: the tensors that a checkpoint would hold have no values yet.
    """
    if derives(plan.method) or any(derives(placement.method) for placement in plan.placements):
        _derive(state, plan.adapter, plan.method, plan.shared, _planned(plan), initial)


def derive_loaded(state: State, adapter: str) -> None:
    """Do the same for constants that follow from tensors that a checkpoint has brought."""
    record = state.record(adapter)
    if record.shared and derives(record.method):
        layers = [layer for layer in state.layers() if isinstance(layer, AdaptedLayer)]
        held = [(layer, entry) for layer in layers for entry in layer.entries.get(adapter, ())]
        _derive(state, adapter, record.method, record.shared, [one for one in held if _readable(*one)], False)


def derives(method: Method) -> bool:
    """Whether a method has constants that follow from the base weights."""
    return type(method).derive is not Method.derive or type(method).derive_shared is not Method.derive_shared


@torch.no_grad()
def _derive(state: State, adapter: str, method: Method, shared: dict[str, Slot], held: Held, initial: bool) -> None:
    wanted = {role: slot for role, slot in shared.items() if initial or not slot.saved}
    own = [(layer, entry) for layer, entry in held if own_method(entry.method) is method]
    if wanted and own and type(method).derive_shared is not Method.derive_shared:
        p = P()
        for role, slot in wanted.items():
            setattr(p, role, find_tensor(state.shared, adapter, *slot.place))
        method.derive_shared(p, _Bases(own))
    for layer, entry in held:
        if type(entry.method).derive is not Method.derive:
            p = layer.params(entry, whole=True)
            entry.method.derive(entry.site, p, wide_base(layer))
            layer.put(entry, p)


class _Bases:
    """The maps of untouched layers, each read when its turn comes."""

    def __init__(self, layers: Held) -> None:
        self.layers = layers

    def __iter__(self) -> Iterator[tuple[Site, Affine]]:
        return (as_seen(entry.method, entry.site, wide_base(layer)) for layer, entry in self.layers)
