"""A plan resolves every target, shape, byte and name before anything is allocated."""

from __future__ import annotations

import copy
import warnings
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.config.types import method_name
from inlay.core import storage
from inlay.core.affine import Site
from inlay.core.alike import Known, Slots, ask
from inlay.core.choose import check_patterns, choose, model_type, nothing_matched, plan_biases
from inlay.core.copies import check_copies, plan_copies, tie_copies
from inlay.core.dtype import adapter_dtype
from inlay.core.extend import extend_plan, without_companions
from inlay.core.initial import untouched
from inlay.core.join import check_joinable
from inlay.core.kind import Kind, kind_of
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.part import method_at
from inlay.core.policy import INLAY, Policy
from inlay.core.rebase import check_rebasable
from inlay.core.registry import method_class
from inlay.core.replicate import Replication, installed, replication_of
from inlay.core.retarget import retargeted
from inlay.core.shared import share_out
from inlay.core.sliced import own_site
from inlay.core.slot import Slot
from inlay.core.state import State, check_adapter_name
from inlay.core.targets import Place, Survey, base_parameters, places
from inlay.core.unfit import found_kind, unreadable, weightless
from inlay.errors import InlayWarning, NoTargetError, TargetError, UnsupportedError
from inlay.parallel.fsdp import refuse_managed
from inlay.parallel.placement import Layout, is_alone, layout_of

__all__ = ["Placement", "Plan", "place_method", "plan"]


@dataclass(slots=True)
class Placement:
    """One adapted place of a plan.

    Attributes:
        place: where in the model.
        site: its frozen shape.
        kind: how it is read and run.
        slots: the tensors it gets, by role.
        pattern: the pattern that chose it.
        options: the method's numbers there.
        method: the method there, if it is not the plan's own (trainable tokens inside another method).
        dtype, device: of the tensors.
        layout: how the tensors are spread over processes, as the base weight is; None where it is not.
        source: the placement whose tensors this one uses, where layers share a weight.
        shares: paths of the other layers that hold the same weight.
        shared: which of the plan's shared tensors it uses, by the roles that they have there.
        borrowed: roles whose tensors are those of another layer, with the placement there.
    """

    place: Place
    site: Site
    kind: Kind
    slots: Slots
    pattern: str
    options: dict[str, Any]
    method: Method
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None = None
    source: Placement | None = None
    shares: tuple[str, ...] = ()
    shared: dict[str, Slot] = field(default_factory=dict)
    borrowed: dict[str, Placement] = field(default_factory=dict)

    @property
    def own(self) -> dict[str, Slot]:
        """The slots whose tensors are made for it."""
        if self.source is not None:
            return {}
        if not self.borrowed:
            return self.slots
        return {role: slot for role, slot in self.slots.items() if role not in self.borrowed}

    @property
    def numel(self) -> int:
        return sum(slot.numel for slot in self.own.values() if slot.trainable)

    @property
    def nbytes(self) -> int:
        return sum(slot.numel * (slot.dtype or self.dtype).itemsize for slot in self.own.values())


@dataclass
class Plan:
    """What ``inject`` will do; prints as a table. Nothing is allocated and the model is untouched.

    Attributes:
        model: the model it was made for.
        adapter: the adapter's name.
        config: the config object that was given (resolved targets are written to it when the plan is applied).
        placements: every layer site.
        copies: modules that get a full copy (``modules_to_save``), with the pattern that chose each.
        ties: pairs of copied layers that share one weight, the embedding first.
        shared: tensors that all sites share, by role.
        matched: pattern -> paths.
        unmatched: patterns that matched nothing, with the nearest names.
        biases: base biases that will train, by the names they have without adapters.
        resolved: config fields whose resolved values are written back.
        replication: the longer list of blocks that the placements lie in, if there is one.
        keys: names of the tensors that the adapter will be filled with, where they are known.
        known: what methods said of sites that they treat alike.
        survey: the model as it was found, for an injection that follows at once.
    """

    model: nn.Module
    adapter: str
    config: Any
    method: Method
    policy: Policy
    state: State | None
    autocast: bool
    placements: list[Placement] = field(default_factory=list)
    copies: list[tuple[Place, str]] = field(default_factory=list)
    ties: list[tuple[Place, Place]] = field(default_factory=list)
    shared: dict[str, Slot] = field(default_factory=dict)
    matched: dict[str, list[str]] = field(default_factory=dict)
    unmatched: dict[str, list[str]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    resolved: dict[str, Any] = field(default_factory=dict)
    replication: Replication | None = None
    keys: frozenset[str] = frozenset()
    known: Known = field(default_factory=dict, repr=False)
    survey: Survey | None = field(default=None, repr=False)

    @property
    def trainable(self) -> int:
        """Parameters that will train."""
        named = base_parameters(self.model)
        return (
            sum(placement.numel for placement in self.placements)
            + sum(slot.numel for slot in self.shared.values() if slot.trainable)
            + sum(p.numel() for place, _ in self.copies for p in place.base.parameters())
            + sum(named[name].numel() for name in self.biases)
        )

    @property
    def total(self) -> int:
        """Parameters of the base model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def nbytes(self) -> int:
        """Bytes that injection allocates."""
        return (
            sum(placement.nbytes for placement in self.placements)
            + sum(slot.numel * (slot.dtype or torch.float32).itemsize for slot in self.shared.values())
            + sum(p.numel() * p.element_size() for place, _ in self.copies for p in place.base.parameters())
        )

    @property
    def base_bytes(self) -> int:
        """Bytes of the base weights that the adapter's start changes, of which copies are kept to be restored."""
        changed = [p for p in self.placements if p.method.rebases and p.source is None]
        weights = [getattr(p.place.base, p.kind.weight_name) for p in changed]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of what trains."""
        return sum(
            slot.numel * (slot.dtype or placement.dtype).itemsize
            for placement in self.placements
            for slot in placement.own.values()
            if slot.trainable
        ) + 4 * (self.trainable - sum(placement.numel for placement in self.placements))

    @property
    def optimiser_bytes(self) -> int:
        """Bytes of two float32 moments for what trains, as Adam keeps."""
        return 8 * self.trainable

    def __str__(self) -> str:
        from inlay.core.report import plan_table

        return plan_table(self)


def plan(
    model: nn.Module,
    config: Any,
    adapter_name: str = "default",
    *,
    policy: Policy | None = None,
    autocast_adapter_dtype: bool = True,
    held: Mapping[str, Tensor] | None = None,
) -> Plan:
    """Resolve a config against a model, on any device, also meta.

    Args:
        model: the model; it may already have adapters.
        config: any layer method's config.
        adapter_name: the new adapter's name.
        policy: strictness; by default the model's own, or Inlay's.
        autocast_adapter_dtype: adapters of a half-precision base are created in float32.
        held: the tensors that the adapter is going to be filled with, which say what an old config means.

    Raises:
        TargetError: a pattern matches nothing, or a match cannot be adapted (policy ``inlay``).
        NoTargetError: nothing at all matches.
        UnsupportedError: the method cannot work on a matched layer; the message says why.
        AdapterNameError: the name is unsafe or taken.
    """
    found = Survey(model)
    states = found.states
    check_joinable(states)
    state = states[0] if states else None
    policy = policy or (state.policy if state is not None else INLAY)
    check_adapter_name(adapter_name, ChainMap(*(one.records for one in states)))
    method = method_class(config.peft_type).variant(config)(copy.deepcopy(config))
    method.prefix_patterns = policy.prefix_patterns
    made = Plan(model, adapter_name, config, method, policy, state, autocast_adapter_dtype, survey=found)
    made.keys = frozenset(held or ())
    for field_name, value in method.implied(model, model_type(model)).items():
        made.resolved[field_name] = value
        setattr(method.config, field_name, copy.deepcopy(value))
    for field_name, value in retargeted(model, method.config, held, policy.prefix_patterns, found.places).items():
        made.resolved[field_name] = value
        setattr(method.config, field_name, copy.deepcopy(value))
    made.replication = replication_of(model, method.config, state)
    with installed(made.replication, model):
        _resolve(made, found.places if made.replication is None else places(model))
    return made


def _resolve(made: Plan, everything: list[Place]) -> None:
    """Find every place that the plan's config means."""
    plan_copies(made, everything)
    chosen = list(without_companions(choose(made, everything)))
    methods = [method_at(made.model, place, pattern, made.method) for place, pattern in chosen]
    if type(made.method).survey is not Method.survey:
        known = [(kind_of(place.base), place, method) for (place, _), method in zip(chosen, methods, strict=True)]
        sites = [(method, kind.site(place.path, place.base)) for kind, place, method in known if kind is not None]
        made.method.survey([own_site(method, site) for method, site in sites])
    for (place, pattern), method in zip(chosen, methods, strict=True):
        made.matched.setdefault(pattern, []).append(place.path)
        made.placements.append(place_method(made, place, pattern, method))
    extend_plan(made, everything)
    tie_copies(made, everything)
    check_copies(made)
    if not made.placements and not made.copies:
        raise NoTargetError(nothing_matched(made, everything))
    refuse_managed((p.place.path, p.place.base) for p in made.placements)
    refuse_managed((place.path, place.module) for place, _ in made.copies)
    check_rebasable(made)
    share_out(made)
    plan_biases(made)
    check_patterns(made)


def place_method(
    made: Plan, place: Place, pattern: str, method: Method, kind: Kind | None = None, site: Site | None = None
) -> Placement:
    """Resolve one method at one place, which is a layer unless ``kind`` and ``site`` say otherwise.

    Raises:
        TargetError: no layer kind knows the module.
        UnsupportedError: the method refuses the site.
    """
    base = place.base
    kind = kind or kind_of(base) or found_kind(place, pattern)
    if site is None and isinstance(place.module, AdaptedLayer) and place.module.site.parameter is not None:
        raise TargetError(
            f"{place.path!r}, matched by {pattern!r}, has its parameter {place.module.site.parameter!r} adapted by "
            "target_parameters of another adapter, so it cannot be adapted as a layer as well"
        )
    reason, site = (None, site) if site is not None else (unreadable(made, place), kind.site(place.path, base))
    if type(method).look is not Method.look and not getattr(base, kind.weight_name).is_meta and reason is None:
        method.look(site, untouched(place, kind, site))
    answers = ask(method, site, made.known)
    reason = reason or answers.refusal or weightless(made, kind, site, method, base)
    if reason is not None:
        raise UnsupportedError(
            f"{method_name(method.config.peft_type)} on {site.name!r} ({type(base).__name__}): {reason}"
        )
    if answers.note is not None:
        warnings.warn(f"{place.path!r}: {answers.note}", InlayWarning, stacklevel=4)
    weight: Any = base._parameters.get(kind.weight_name)
    if weight is None:
        weight = getattr(base, kind.weight_name)
    dtype = adapter_dtype(storage.floating_dtype(base, kind.weight_name), made.autocast)
    layout = None if is_alone(base, weight) else layout_of(base, kind, site)
    return Placement(place, site, kind, answers.slots, pattern, answers.options, method, dtype, weight.device, layout)
