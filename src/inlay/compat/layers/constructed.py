"""Layers that PEFT's users construct themselves: the engine's layer, made from PEFT's arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.compat.layers.making import bound, complete, method_for, own_config
from inlay.compat.layers.table import Recorded
from inlay.compat.layers.variants import VariantMembers, give_variant
from inlay.compat.layers.viewing import LayerView
from inlay.core.affine import Affine, Site
from inlay.core.build import build, build_shared
from inlay.core.entry import Entry
from inlay.core.hanging import dismount, hang
from inlay.core.initial import derive
from inlay.core.inject import mount
from inlay.core.kind import Kind, kind_of
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.plan import Placement, Plan, place_method
from inlay.core.policy import PEFT
from inlay.core.rebase import prepare
from inlay.core.shared import register_shared, share_out
from inlay.core.state import Record, State, check_adapter_name
from inlay.core.targets import Place
from inlay.core.tied import tied_placement
from inlay.errors import MergeError, TargetError
from inlay.kinds.attention import AttentionLayer, Output, OutputLayer

__all__ = ["ConstructedLayer", "adopt", "attach", "take"]


def attach(
    layer: AdaptedLayer,
    adapter: str,
    method: Method,
    shared: dict[str, Tensor] | None = None,
    tied: AdaptedLayer | None = None,
    beside: bool = False,
) -> None:
    """Give one adapted layer an adapter.

    Args:
        layer: in a model or by itself.
        adapter: its name.
        method: what it does, with the config for this layer.
        shared: tensors that all layers of the adapter share, by role; made where they are needed and not given.
        tied: a layer with the same weight and the same adapter, whose tensors this one uses.
        beside: keep what the layer has under that name, instead of replacing it.

    Raises:
        UnsupportedError: the method refuses the layer; it is then as before.
        MergeError: an adapter of that name is merged into it.
    """
    state = layer.state
    check_adapter_name(adapter)
    if adapter in layer._merged:
        raise MergeError(f"{layer.site.name!r}: adapter {adapter!r} is merged; unmerge it before replacing it")
    method.prefix_patterns = state.policy.prefix_patterns
    holder = nn.Module()
    holder._modules["layer"] = layer
    made = Plan(holder, adapter, method.config, method, state.policy, state, autocast=False)
    place = Place(layer.site.owner, layer, [(holder, "layer")], [])
    if tied is None:
        placement = place_method(made, place, "update_layer", method, layer.kind, layer.site)
    else:
        placement = _tied(made, place, tied, method)
    made.placements.append(placement)
    record = state.records.get(adapter)
    if record is not None:
        record.reach = None  # it does not know this layer
    if record is not None and record.shared:
        made.shared = record.shared
        placement.shared = method.shared_at(layer.site, record.shared)
    else:
        share_out(made)
    seed = torch.initial_seed()
    tensors = build(made, placement, False, True, seed)
    first = not state.records
    if not beside:
        dismount(layer, adapter)
    if made.shared and (record is None or not record.shared):
        common = shared or build_shared(made, False, seed)
        for role, slot in made.shared.items():
            hang(state.shared, adapter, slot, common[role], nn.Module)
        register_shared(layer, state)
    mount(layer, made, placement, tensors, [])
    derive(made, state, record is None or not record.shared)
    prepare(made, state, [])
    state.records.setdefault(adapter, Record(method.config, method, seed, shared=dict(made.shared)))
    state.training.add(adapter)
    if first:
        state.active = (adapter,)
    state.touch()


def _tied(made: Plan, place: Place, tied: AdaptedLayer, method: Method) -> Placement:
    """Return the placement that uses the tensors of a layer with the same weight."""
    holder = nn.Module()
    holder._modules["layer"] = tied
    there = Place(tied.site.owner, tied, [(holder, "layer")], [])
    source = place_method(made, there, "tied", method, tied.kind, tied.site)
    placement = tied_placement(made, source, place)
    if placement is None:
        raise TargetError(f"{type(place.base).__name__} has no weight that it could share with another layer")
    return placement


def adopt(layer: AdaptedLayer, state: State, path: str) -> None:
    """Make a layer that was constructed by itself, with all that it has, a part of a model's state.

    Args:
        state: the model's state.
        path: where in the model the layer stands.
    """
    own = layer.state
    if own is state:
        return
    own.leave(layer)
    merged, kept = layer._merged, layer._kept
    layer.join(state)
    layer.__dict__["_merged"], layer.__dict__["_kept"] = merged, kept
    layer.__dict__["site"] = replace(layer.site, name=path)
    for name, entries in layer.entries.items():
        for entry in entries:
            entry.site = replace(entry.site, name=path)
        if name in own.records:
            state.records.setdefault(name, own.records[name])
            state.training.add(name)
    for name, container in own.shared._modules.items():
        state.shared._modules.setdefault(name, container)
    state.touch()


def take(
    layer: AdaptedLayer, entry: Recorded, known: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Give a layer an adapter from the arguments of ``update_layer`` of a class of PEFT.

    Args:
        layer: any of the engine's.
        entry: the class.
        known: further arguments, by name.
        args, kwargs: as they were passed.
    """
    given = known | bound(entry.update_signature, args, kwargs)
    complete(entry, given)
    adapter = given["adapter_name"]
    before = next((e.options["on_input"] for e in layer._each() if "on_input" in e.options), None)
    if before is not None:
        given.setdefault("is_feedforward", before)
    config = own_config(given["config"], given)
    method = method_for(entry.peft_type, entry.name, config)(config)
    shared = {}
    for role, slot in method.shared_slots([layer.site]).items():
        holder = given.get(slot.place[0][0])
        if holder is not None and len(holder):
            shared[role] = holder[adapter] if adapter in holder else next(iter(holder.values()))
    targets = [layer]
    if isinstance(layer, AttentionLayer) and layer.output is not None:
        targets.append(layer.output)
    for target in targets:
        attach(target, adapter, method, shared or None, tied=given.get("tied_adapter") or None)
        target.set_adapter(list(layer.active), inference_mode=config.inference_mode)
    _vary(layer, adapter, given["config"])


def _vary(layer: AdaptedLayer, adapter: str, config: Any) -> None:
    if isinstance(layer, VariantMembers):
        give_variant(layer, adapter, config)


class ConstructedLayer(AdaptedLayer, metaclass=LayerView):
    """Base of PEFT's layer classes that are modules (``lora.Linear``, ``ia3.Conv2d``, ...).

    A user's subclass may override ``forward``, ``merge``, ``unmerge``, ``update_layer`` and ``get_delta_weight``; the
    model that it becomes part of calls them.
    """

    _recorded: Any = None
    _deferred: Any = False  # whether the first adapter comes by a call of update_layer, and not with the layer

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        entry: Recorded = self._recorded
        given = bound(entry.init_signature, args, kwargs)
        base = given.pop("base_layer")
        if not self._deferred:
            complete(entry, given)
        method_for(entry.peft_type, entry.name, given["config"])
        kind, site = self._place_of(base, given)
        super().__init__(base, kind, site, State(policy=PEFT))
        if isinstance(self, AttentionLayer) and self.output is None:  # it reads this layer, which is adapted with it
            out = base._modules["out_proj"]
            base._modules["out_proj"] = OutputLayer(out, Output(), Output().site("out_proj", out), self.state)
        self.kwargs = {name: value for name, value in kwargs.items() if name not in entry.init_signature.parameters}
        if self._deferred:
            self.state.active = (given["adapter_name"],)
            return
        wanted = entry.update_signature.parameters
        self.__dict__["_given"] = given
        try:
            self.update_layer(
                *([base] if "layer" in wanted else ()),
                given["adapter_name"],
                **{name: value for name, value in given.items() if name in wanted and name != "adapter_name"},
            )
        finally:
            del self.__dict__["_given"]

    @classmethod
    def _place_of(cls, base: nn.Module, given: dict[str, Any]) -> tuple[Kind, Site]:
        """Return the kind and the shape of a base layer that this class stands on.

        Raises:
            TargetError: it is none of this class's.
        """
        kind = kind_of(base)
        allowed = cls._recorded.kinds
        if kind is None or not {kind.name, ""} & set(allowed):
            raise TargetError(
                f"{cls.__name__}: base_layer expected to be a layer of the kind {' or '.join(allowed)}, found "
                f"{type(base).__name__}"
            )
        return kind, kind.site("", base)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Give this layer a further adapter; those that are active stay so. PEFT's classes differ in the arguments.

        Raises:
            ConfigError: a number is not allowed.
            UnsupportedError: the method refuses the layer.
        """
        pending: Callable[[], None] | None = self.__dict__.pop("_pending", None)
        if pending is None:
            take(self, self._recorded, self.__dict__.get("_given", {}), args, kwargs)
        else:  # a model puts the adapter in, and has made its tensors already
            pending()
            given = bound(self._recorded.update_signature, args, kwargs)
            _vary(self, given["adapter_name"], given["config"])

    def receive(self, adapter_name: str, method: Method, mount: Callable[[], None]) -> None:
        if not _overrides(self, "update_layer"):
            mount()
            _vary(self, adapter_name, method.config)
            return
        self.__dict__["_pending"] = mount
        wanted = self._recorded.update_signature.parameters
        numbers = {name: value for name, value in method.options(self.site).items() if name in wanted}
        try:
            self.update_layer(adapter_name, **numbers, config=method.config)
        finally:
            self.__dict__.pop("_pending", None)

    @property
    def merges_itself(self) -> bool:
        return _overrides(self, "merge") or _overrides(self, "unmerge")

    def fold(self, chain: tuple[Entry, ...], dtype: torch.dtype | None = None, whole: bool = False) -> Affine:
        variants = self.__dict__.get("lora_variant") or {}
        own_delta = _overrides(self, "get_delta_weight")
        if not own_delta and not variants:
            return super().fold(chain, dtype, whole)
        layer = self.present_affine(whole)
        layer = layer if dtype is None else layer.to(dtype)
        base = layer
        for entry in chain:
            if entry.name in variants:
                stored = self.kind.from_matrix(self.site, layer.weight)
                merged = variants[entry.name].merge_safe(self, entry.name, stored)
                layer = Affine(self.kind.to_matrix(self.site, merged), layer.bias)
                continue
            rewritten = entry.method.rewrite(entry.site, self.params(entry), layer, base)
            if own_delta:
                update = self.kind.to_matrix(self.site, self.get_delta_weight(entry.name)).to(layer.weight.dtype)
                rewritten = Affine(layer.weight + update, rewritten.bias)
            layer = rewritten
        return layer


def _overrides(layer: ConstructedLayer, name: str) -> bool:
    """Whether a user's subclass has a method of its own in the place of the engine's."""
    found = next(cls for cls in type(layer).__mro__ if name in cls.__dict__)
    return "_view" not in found.__dict__ and not found.__module__.startswith("inlay.")
