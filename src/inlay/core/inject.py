"""Apply a plan to its model, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.build import build, build_shared
from inlay.core.collect import uncollected
from inlay.core.eject import restore_grad
from inlay.core.entry import Entry
from inlay.core.follow import base_modules
from inlay.core.hanging import dismount, drop_shared, hang, hang_all, hang_dropout
from inlay.core.initial import Undo, derive, standing
from inlay.core.join import joined, offsets
from inlay.core.layer import AdaptedLayer
from inlay.core.lifecycle import penalises
from inlay.core.method import Method
from inlay.core.mount import ModuleCopies
from inlay.core.plan import Placement, Plan
from inlay.core.readers import silence_readers
from inlay.core.rebase import prepare
from inlay.core.shared import register_shared
from inlay.core.state import Record, State
from inlay.core.surface import LayerSurface
from inlay.core.targets import Place, Survey
from inlay.errors import StateError, UnsupportedError
from inlay.parallel.hooks import lift, lower

__all__ = ["freeze", "inject", "mount", "occupy"]

# What was done to layers, in order: one put where a module stood, or (without module and place) an adapter into one.
Placed = list[tuple[AdaptedLayer, nn.Module | None, Place | None]]


@uncollected
def inject(
    plan: Plan,
    *,
    low_memory: bool = False,
    seed: int | None = None,
    initialise: bool = True,
    trainable: bool = True,
    then: Callable[[State], object] | None = None,
    unchanged: bool = False,
) -> State:
    """Put a planned adapter into its model, in place; the model ends unchanged if anything fails.

    Args:
        plan: from :func:`inlay.core.plan.plan`, for the model as it is now.
        low_memory: create the tensors on the meta device, to be assigned by a load.
        seed: what initial values are drawn from, together with site and slot; by default ``torch.initial_seed()``.
        initialise: False leaves initial values undefined, for a load that overwrites them.
        trainable: the adapter's tensors get gradients.
        then: what belongs to the injection (such as that load); if it raises, everything is undone.
        unchanged: the model was planned just now, so what the plan found in it need not be looked for again.

    Returns:
        The model's state; the adapter is active if it is the first.

    Raises:
        StateError: the model was changed since it was planned.
    """
    seed = torch.initial_seed() if seed is None else seed
    found = plan.survey if unchanged and plan.survey is not None else Survey(plan.model)
    plan.survey = None  # what it says is soon not so any more
    modules = found.modules
    state = joined(plan.model, found.states) or plan.state or State(policy=plan.policy)
    undo: list[Undo] = []
    first = not state.records
    parameters = found.parameters
    biases = {name: parameters[name] for name in plan.biases}
    if type(plan.method).look is not Method.look and any(p.device.type == "meta" for p in plan.placements):
        raise UnsupportedError(
            f"{type(plan.method).__name__} finds the shapes of its tensors in the base weights, which have no values "
            "on the meta device; load them first"
        )
    try:
        if plan.adapter in state.records:
            raise StateError(f"adapter {plan.adapter!r} came after this plan was made; plan again")
        shared = build_shared(plan, low_memory, seed)
        built = [(placement, build(plan, placement, low_memory, initialise, seed)) for placement in plan.placements]
        above = freeze(plan.model, state, parameters, undo)
        if above:  # the model is a part of the one that had the first adapter
            for placement, _ in built:
                placement.site = placement.site.below(above)
                placement.shares = tuple(above + path for path in placement.shares)
        if plan.replication is not None:
            plan.replication.install(plan.model)
            undo.append(partial(plan.replication.restore, plan.model))
            undo.append(partial(setattr, state, "replication", None))
            state.replication = plan.replication
        occupy(plan, state, built, undo, trainable, modules if plan.replication is None else None)
        if shared:
            _mount_shared(plan, state, shared, undo, trainable)
        biased = tuple(above + name for name in biases)
        state.records[plan.adapter] = Record(plan.config, plan.method, seed, shared=dict(plan.shared), biases=biased)
        undo.append(lambda: state.records.pop(plan.adapter, None))
        undo.append(partial(setattr, state, "penalised", state.penalised))
        undo.append(partial(setattr, state, "coupled", state.coupled))
        state.penalised |= penalises(plan.method)
        state.coupled |= plan.method.couples
        if trainable:
            undo.append(lambda: state.training.discard(plan.adapter))
            state.training.add(plan.adapter)
        fresh = initialise and not low_memory
        if fresh or not plan.shared:  # constants may follow from shared tensors, which a load brings and sees to
            derive(plan, state, fresh)
        prepare(plan, state, undo, fresh)
        for name, p in biases.items():
            undo.append(partial(p.requires_grad_, p.requires_grad))
            if above + name not in state.base_values:
                undo.append(partial(state.base_values.pop, above + name))
                state.base_values[above + name] = p.detach().clone()
            p.requires_grad_(True)
        for name, value in plan.resolved.items():
            undo.append(partial(setattr, plan.config, name, getattr(plan.config, name)))
            setattr(plan.config, name, value)
        if first:
            state.active = (plan.adapter,)
            undo.append(lambda: setattr(state, "active", ()))
        if then is not None:
            then(state)
    except BaseException:
        for step in reversed(undo):
            step()
        state.touch()
        raise
    state.touch()
    return state


def occupy(
    plan: Plan,
    state: State,
    built: Iterable[tuple[Placement, dict[str, Tensor]]],
    undo: list[Undo],
    trainable: bool = True,
    modules: Iterable[nn.Module] | None = None,
) -> None:
    """Put layers with their tensors, and full copies of modules, where a plan has them.

    ``modules`` is what :func:`inlay.core.follow.base_modules` yields, where that is known.
    """
    placed: Placed = []
    undo.append(partial(_displace, plan.adapter, state, placed))
    for placement, tensors in built:
        layer = _adapted(placement, state, placed)
        if type(layer).receive is LayerSurface.receive:
            mount(layer, plan, placement, tensors, placed, trainable)
        else:
            mounting = partial(mount, layer, plan, placement, tensors, placed, trainable)
            layer.receive(plan.adapter, placement.method, mounting)
    for place, _ in plan.copies:
        _copy_module(place, plan.adapter, state, undo, trainable)
    _tie_copies(plan)
    undo.append(silence_readers(base_modules(plan.model) if modules is None else modules))


def freeze(model: nn.Module, state: State, parameters: dict[str, nn.Parameter], undo: list[Undo]) -> str:
    """Freeze what no earlier adapter has frozen; returns what the state's names have before this model's."""
    above = offsets(state, model)[1]
    new = {name: p for name, p in parameters.items() if above + name not in state.base_grad}
    before = {name: p.requires_grad for name, p in new.items()}
    undo.append(partial(restore_grad, parameters, before))
    undo.append(partial(setattr, state, "base_grad", state.base_grad))
    state.base_grad = state.base_grad | {above + name: flag for name, flag in before.items()}
    for p in new.values():
        p.requires_grad_(False)
    return above


def _displace(adapter: str, state: State, placed: Placed) -> None:
    """Undo what was done to layers."""
    for layer, here, place in reversed(placed):
        if here is None or place is None:
            dismount(layer, adapter)
            continue
        lower(layer, here)
        place.put(here)
        state.leave(layer)


def _adapted(placement: Placement, state: State, placed: Placed) -> AdaptedLayer:
    """Return the adapted layer at a place, putting one there if there is none."""
    found = standing(placement)
    if found is not None:
        return found
    parent, name = placement.place.parents[0]
    here: Any = parent._modules[name]  # several parameters of one module are nested
    layer = placement.kind.adapt(here, placement.site, state)
    layer.__dict__["shares"] = placement.shares
    placed.append((layer, here, placement.place))
    placement.place.put(layer)
    lift(here, layer)
    return layer


def mount(
    layer: AdaptedLayer,
    plan: Plan,
    placement: Placement,
    tensors: dict[str, Tensor],
    placed: Placed,
    trainable: bool = True,
) -> None:
    """Hang an entry's tensors below the layer, where their slots say."""
    adapter, method = plan.adapter, placement.method
    entry = Entry(adapter, method, placement.site, placement.slots.roles, dict(placement.options))
    if placement.layout is not None:
        entry.mesh = placement.layout.mesh
    if placement.shared:
        entry.shared = tuple((role, *slot.place) for role, slot in placement.shared.items())
    layer.entries[adapter] = (*layer.entries.get(adapter, ()), entry)
    placed.append((layer, None, None))
    field = method.dropout_field
    if field is not None:
        hang_dropout(layer, field, adapter, method.dropout)
    if placement.source is None:
        hang_all(layer, adapter, placement, tensors, trainable)
    else:
        entry.home = standing(placement.source)


def _mount_shared(plan: Plan, state: State, tensors: dict[str, Tensor], undo: list[Undo], trainable: bool) -> None:
    """Hang shared tensors below the state, and register them at the model's root."""

    def back() -> None:
        drop_shared(state, plan.shared, plan.adapter)
        register_shared(plan.model, state)

    undo.append(back)
    for role, tensor in tensors.items():
        hang(state.shared, plan.adapter, plan.shared[role], tensor, nn.Module, trainable)
    register_shared(plan.model, state)


def _copy_module(place: Place, adapter: str, state: State, undo: list[Undo], trainable: bool) -> None:
    """Give an adapter its full copy of a module."""
    here = place.module
    if isinstance(here, ModuleCopies):
        copies = here
    else:
        copies = ModuleCopies(place.path, here, state)

        def back() -> None:
            place.put(here)
            state.leave(copies)

        undo.append(back)
        place.put(copies)
    undo.append(lambda: copies.modules_to_save._modules.pop(adapter, None))
    copies.add(adapter)
    for parameter in copies.modules_to_save._modules[adapter].parameters():
        if parameter.is_floating_point() or trainable:
            parameter.requires_grad_(trainable)


def _tie_copies(plan: Plan) -> None:
    """Let the full copies of tied layers share their weight, as the originals do."""
    for pair in plan.ties:
        standing: list[Any] = [place.parents[0][0]._modules[place.parents[0][1]] for place in pair]
        source, member = (copies.modules_to_save._modules[plan.adapter] for copies in standing)
        member._parameters["weight"] = source._parameters["weight"]
