"""Initial values that depend on base weights, and base weights that an adapter's start changes."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.affine import Affine
from inlay.core.entry import Entry
from inlay.core.initial import Undo, standing, wide_base
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method, P
from inlay.core.sliced import own_method
from inlay.core.state import Record, State
from inlay.core.storage import storage_of
from inlay.errors import InlayWarning, MergeError, StateError, UnsupportedError
from inlay.parallel.tensors import gather, is_distributed

if TYPE_CHECKING:
    from inlay.core.plan import Placement, Plan

__all__ = ["base_change", "begin_again", "check_rebasable", "noted_as", "prepare"]


def noted_as(name: str, parameter: str | None) -> str:
    """Return the attribute of a module that holds what a calibration pass measured there; see ``Method.measured``."""
    return name if parameter is None else f"{name}_{parameter}"


def check_rebasable(made: Plan) -> None:
    """A base weight can be changed for an adapter only if every layer that reads it has the adapter.

    Raises:
        UnsupportedError: names the layer that would be changed and not adapted.
    """
    if not made.method.rebases:
        return
    cause = made.method.base_cause
    if made.replication is not None:
        raise UnsupportedError(
            f"layer_replication lets several layers share one base weight, and {cause} takes another "
            "update out of it for each of them; use init_lora_weights=True and no kasa_config"
        )
    own = [placement for placement in made.placements if own_method(placement.method) is made.method]
    tied = {p.place.path: p.source for p in made.placements if p.source is not None}
    for placement in own:
        path = placement.place.path
        for other in placement.shares:
            if tied.get(other) is not placement:
                raise UnsupportedError(
                    f"{path!r} shares its weight with {other!r}, which has not the same adapter, and {cause} "
                    f"changes the weight; set ensure_weight_tying=True if one is an embedding and the other "
                    "its head, or leave the layer out"
                )
        if getattr(placement.place.base, "max_norm", None) is not None:
            raise UnsupportedError(
                f"{path!r} renormalises rows above max_norm at each lookup, and would do so with what {cause} "
                f"leaves of them"
            )
        if not storage_of(placement.place.base).writable:
            raise UnsupportedError(f"{path!r}: {cause} changes the base weight, which is read-only there")


@torch.no_grad()
def prepare(plan: Plan, state: State, undo: list[Undo], fresh: bool = True) -> None:
    """Let methods set initial values that depend on the base weight.

    Args:
        fresh: False if values are going to be loaded: then only the base is changed, as it was when the adapter began.

    Raises:
        UnsupportedError: the base is to be changed and has no values yet.
        MergeError: it is to be changed while something is merged into it.
        StateError: the base was changed for the adapter, and nothing says how.
    """
    record = state.records.get(plan.adapter)
    for placement in plan.placements:
        method = placement.method
        if placement.source is not None or not (method.needs_base if fresh else method.rebases):
            continue
        layer = standing(placement)
        assert layer is not None
        if getattr(layer.leaf_layer, layer.kind.weight_name).device.type == "meta":
            if method.rebases:
                raise UnsupportedError(
                    f"{placement.site.name!r}: {method.base_cause} decomposes the base "
                    "weight, which is on the meta device; load the base model's weights first"
                )
            continue
        for entry in layer.entries[plan.adapter]:
            if entry.method is method:
                _prepare_at(layer, entry, method, record, undo, None if fresh else placement)
    if record is not None and record.rebased:
        _warn_shared_base(state, plan.adapter)
    elif record is not None and fresh and plan.method.rebases and any(_real(one, plan) for one in plan.placements):
        warnings.warn(
            f"nothing was measured for {plan.method.base_cause} of adapter {plan.adapter!r}, "
            "which begins in the ordinary way, and is saved so",
            InlayWarning,
            stacklevel=4,
        )
        record.saved["init_lora_weights"] = True


def _real(placement: Placement, plan: Plan) -> bool:
    return own_method(placement.method) is plan.method and placement.device.type != "meta"


def begin_again(layer: AdaptedLayer, entry: Entry, method: Method) -> None:
    """Give an adapter at one layer the initial values of ``method``, which differs from its own in how it starts."""
    undo: list[Undo] = []
    try:
        with torch.no_grad():
            _prepare_at(layer, entry, method, layer.state.records.get(entry.name), undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    layer.state.touch()


def _prepare_at(
    layer: AdaptedLayer,
    entry: Entry,
    method: Method,
    record: Record | None,
    undo: list[Undo],
    loaded: Placement | None = None,
) -> None:
    if method.rebases and layer._merged:
        raise MergeError(
            f"{layer.site.name!r}: the start of {entry.name!r} changes the base weight, and "
            f"{', '.join(map(repr, layer._merged))} is merged into it; unmerge first"
        )
    base = wide_base(layer)
    p = layer.params(entry, whole=True)
    if loaded is not None:
        p = _apart(p, loaded, base.weight.device)
    leaf: Any = layer.leaf_layer
    notes = {name: noted_as(name, entry.site.parameter) for name in method.measured}
    p.measured = {name: vars(leaf)[note] for name, note in notes.items() if note in vars(leaf)}
    rebased = method.prepare(entry.site, p, base)
    if loaded is None:
        layer.put(entry, p)
    if rebased is not None:
        _rebase(layer, base, rebased, record, undo)
    elif loaded is not None:
        _unknown_base(layer, entry)
    for name in p.measured:
        undo.append(partial(setattr, leaf, notes[name], p.measured[name]))
        delattr(leaf, notes[name])


def _apart(p: P, placement: Placement, device: torch.device) -> P:
    """Give an adapter at a site tensors of its own, to be thrown away, because a load brings the real ones."""
    for role, slot in placement.slots.items():
        setattr(p, role, torch.zeros(slot.shape, dtype=slot.dtype or placement.dtype, device=device))
    return p


def _rebase(layer: AdaptedLayer, base: Affine, rebased: Affine, record: Record | None, undo: list[Undo]) -> None:
    """Write the new base that a start asks for, recording the old one."""
    leaf, state = layer.leaf_layer, layer.state
    new = layer.kind.stored(leaf, layer.site, rebased)
    if rebased.bias is base.bias:
        new.pop(layer.kind.bias_name, None)
    old = {name: _kept(getattr(leaf, name)) for name in new}
    for name, tensor in old.items():
        key = f"{layer.site.owner}.{name}".lstrip(".")
        if key not in state.base_values:
            undo.append(partial(state.base_values.pop, key))
            state.base_values[key] = tensor
        if record is not None:
            record.rebased.setdefault(key, tensor)
    undo.append(lambda: layer.write(old, (), {}))
    layer.write(new, (), {})


def base_change(layer: AdaptedLayer, adapter: str) -> Tensor | None:
    """Return what an adapter's start added to a layer's base weight, (*experts, out, fan_in), None if nothing."""
    records = layer.state.records
    key = f"{layer.site.owner}.{layer.kind.weight_name}".lstrip(".")
    before = records[adapter].rebased.get(key)
    if before is None:
        return None
    after = list(records)[list(records).index(adapter) + 1 :]
    later = next((records[name].rebased[key] for name in after if key in records[name].rebased), None)
    present = wide_base(layer).weight
    now = present if later is None else layer.kind.to_matrix(layer.site, later.to(present))
    return now - layer.kind.to_matrix(layer.site, gather(before).to(present))


def _kept(tensor: Tensor) -> Tensor:
    """Return a copy in host memory, where the originals of merged weights are too."""
    tensor = tensor.detach()
    return tensor.clone() if is_distributed(tensor) else tensor.to("cpu", copy=True)


def _unknown_base(layer: AdaptedLayer, entry: Entry) -> None:
    text = (
        f"adapter {entry.name!r} was trained over base weights that its start "
        f"({entry.method.config.init_lora_weights!r}) changed, and nothing here says how {layer.site.name!r} was. Save "
        "such adapters with path_initial_model_for_weight_conversion, or set init_lora_weights=True in the "
        "configuration if this model has the changed base weights already"
    )
    if layer.state.policy.strict_load:
        raise StateError(text)
    warnings.warn(text, InlayWarning, stacklevel=6)


def _warn_shared_base(state: State, adapter: str) -> None:
    """Every adapter reads the base as the last one changed it."""
    others = [name for name in state.records if name != adapter]
    if others:
        warnings.warn(
            f"adapter {adapter!r} changes base weights, and {', '.join(map(repr, others))} has them changed too; to "
            "use it beside others, convert it to an ordinary LoRA (save_pretrained with "
            "path_initial_model_for_weight_conversion)",
            InlayWarning,
            stacklevel=5,
        )
