"""Apply a plan to its model, all or nothing, and take adapters out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.dtype import merge_dtype
from inlay.core.join import joined, offsets
from inlay.core.layer import AdaptedLayer, AdapterTensors, Entry, find_tensor
from inlay.core.mount import ModuleCopies
from inlay.core.plan import Placement, Plan
from inlay.core.readers import restore_readers, silence_readers
from inlay.core.shared import register_shared, unregister_shared
from inlay.core.slot import Slot, generator_for
from inlay.core.state import Record, State
from inlay.core.targets import places
from inlay.errors import MergeError, StateError
from inlay.parallel.fsdp import refuse_shell, settle
from inlay.parallel.hooks import lift, lower
from inlay.parallel.placement import spread
from inlay.parallel.tensors import scatter

__all__ = ["adapter_parameters", "delete", "eject", "inject", "set_active", "set_trainable"]

# One step back, should a later step of an injection fail.
Undo = Callable[[], object]


def inject(
    plan: Plan,
    *,
    low_memory: bool = False,
    seed: int | None = None,
    initialise: bool = True,
    then: Callable[[State], object] | None = None,
) -> State:
    """Put a planned adapter into its model, in place; the model ends unchanged if anything fails.

    Args:
        plan: from :func:`inlay.core.plan.plan`, for the model as it is now.
        low_memory: create the tensors on the meta device, to be assigned by a load.
        seed: what initial values are drawn from, together with site and slot; by default ``torch.initial_seed()``.
        initialise: False leaves initial values undefined, for a load that overwrites them.
        then: what belongs to the injection (such as that load); if it raises, everything is undone.

    Returns:
        The model's state; the adapter is active if it is the first.

    Raises:
        StateError: the model was changed since it was planned.
    """
    seed = torch.initial_seed() if seed is None else seed
    state = joined(plan.model) or plan.state or State(policy=plan.policy)
    undo: list[Undo] = []
    first = not state.records
    parameters = dict(plan.model.named_parameters())
    biases = {name: parameters[name] for name in plan.biases}
    try:
        if plan.adapter in state.records:
            raise StateError(f"adapter {plan.adapter!r} came after this plan was made; plan again")
        shared = _build_shared(plan, low_memory, seed)
        built = [(placement, _build(plan, placement, low_memory, initialise, seed)) for placement in plan.placements]
        above = _freeze(plan.model, state, parameters, undo)
        if above:  # the model is a part of the one that had the first adapter
            for placement, _ in built:
                placement.site = placement.site.below(above)
                placement.shares = tuple(above + path for path in placement.shares)
        if plan.replication is not None:
            plan.replication.install(plan.model)
            undo.append(partial(plan.replication.restore, plan.model))
            undo.append(partial(setattr, state, "replication", None))
            state.replication = plan.replication
        for placement, tensors in built:
            layer = _adapted(placement, state, undo)
            _mount(layer, plan, placement, tensors, undo)
        for place, _ in plan.copies:
            _copy_module(place, plan.adapter, state, undo)
        _tie_copies(plan)
        undo.append(silence_readers(plan.model))
        if shared:
            _mount_shared(plan, state, shared, undo)
        state.records[plan.adapter] = Record(plan.config, plan.method, seed, shared=dict(plan.shared))
        undo.append(lambda: state.records.pop(plan.adapter, None))
        if initialise and not low_memory:
            _prepare(plan, state, undo)
        for name, p in biases.items():
            undo.append(partial(p.requires_grad_, p.requires_grad))
            if above + _clean(name) not in state.base_values:
                undo.append(partial(state.base_values.pop, above + _clean(name)))
                state.base_values[above + _clean(name)] = p.detach().clone()
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


def _freeze(model: nn.Module, state: State, parameters: dict[str, nn.Parameter], undo: list[Undo]) -> str:
    """Freeze what no earlier adapter has frozen; returns what the state's names have before this model's."""
    above = offsets(state, model)[1]
    adapters = {id(p) for p in adapter_parameters(state, state.records)}
    new = {name: p for name, p in parameters.items() if above + _clean(name) not in state.base_grad}
    new = {name: p for name, p in new.items() if id(p) not in adapters}
    before = {_clean(name): p.requires_grad for name, p in new.items()}
    undo.append(partial(_restore_grad, model, before))
    undo.append(partial(setattr, state, "base_grad", state.base_grad))
    state.base_grad = state.base_grad | {above + name: flag for name, flag in before.items()}
    for p in new.values():
        p.requires_grad_(False)
    return above


def _clean(name: str) -> str:
    """Return a parameter's name as it is without adapters."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def _new(slot: Slot, site: Site, dtype: torch.dtype, device: torch.device, plan: Plan, seed: int, fill: bool) -> Tensor:
    """Create one tensor; initial values are always drawn on the CPU."""
    dtype = slot.dtype or dtype
    if device.type == "meta" or not fill:
        return torch.empty(slot.shape, dtype=dtype, device=device)
    tensor = torch.empty(slot.shape, dtype=dtype)
    generator = generator_for(seed, site.name, slot.key) if plan.policy.own_seed else torch.default_generator
    with torch.no_grad():
        slot.init(tensor, generator)
    return tensor.to(device)


def _build(plan: Plan, placement: Placement, low_memory: bool, fill: bool, seed: int) -> dict[str, Tensor]:
    if placement.source is not None:  # it uses the tensors of another layer
        return {}
    meta = torch.device("meta")
    layout = placement.layout
    return {
        role: spread(
            _new(
                slot,
                placement.site,
                placement.dtype,
                meta if low_memory and slot.saved else placement.device,  # no load would bring the others
                plan,
                seed,
                fill or slot.buffer,
            ),
            slot,
            layout,
        )
        for role, slot in placement.slots.items()
    }


def _build_shared(plan: Plan, low_memory: bool, seed: int) -> dict[str, Tensor]:
    """Create the tensors that live at the root, on the device of the first site."""
    if not plan.shared:
        return {}
    first = next(p for p in plan.placements if p.method is plan.method)
    tensors = {}
    for role, slot in plan.shared.items():
        device = torch.device("meta") if low_memory and slot.saved else first.device
        tensors[role] = _new(slot, Site("", "shared", 0, 0), first.dtype, device, plan, seed, True)
    layout = next((p.layout for p in plan.placements if p.layout is not None), None)
    if layout is not None:  # plain in every process, because layers beside it may not be spread at all
        tensors = {role: layout.agree(tensor) for role, tensor in tensors.items()}
    return tensors


def _adapted(placement: Placement, state: State, undo: list[Undo]) -> AdaptedLayer:
    """Return the adapted layer at a place, putting one there if there is none."""
    found = _standing(placement)
    if found is not None:
        return found
    parent, name = placement.place.parents[0]
    here: Any = parent._modules[name]  # several parameters of one module are nested
    layer = placement.kind.adapt(here, placement.site, state)
    layer.shares = placement.shares

    def back() -> None:
        lower(layer, here)
        for parent, name in placement.place.parents:
            setattr(parent, name, here)
        state.leave(layer)

    undo.append(back)
    for parent, name in placement.place.parents:
        setattr(parent, name, layer)
    lift(here, layer)
    return layer


def _mount(
    layer: AdaptedLayer,
    plan: Plan,
    placement: Placement,
    tensors: dict[str, Tensor],
    undo: list[Undo],
) -> None:
    """Hang an entry's tensors below the layer, where their slots say."""
    adapter = plan.adapter
    entry = Entry(adapter, placement.method, placement.site, placement.slots)
    if placement.layout is not None:
        entry.mesh = placement.layout.mesh
    if placement.method is plan.method:
        entry.shared = tuple((role, *slot.place) for role, slot in plan.shared.items())
    layer.entries[adapter] = (*layer.entries.get(adapter, ()), entry)
    undo.append(lambda: dismount(layer, adapter))
    field = placement.method.dropout_field
    if field is not None:
        p = float(getattr(placement.method.config, field) or 0.0)
        _container(layer, (field,), nn.ModuleDict)._modules[adapter] = nn.Dropout(p) if p > 0.0 else nn.Identity()
    if placement.source is not None:
        entry.home = _standing(placement.source)
    for role, slot in placement.slots.items() if placement.source is None else ():
        _hang(layer, adapter, slot, tensors[role], partial(placement.kind.leaf, placement.site, slot))


def _hang(home: nn.Module, adapter: str, slot: Slot, tensor: Tensor, new_leaf: Callable[[], nn.Module]) -> None:
    """Register one tensor below ``home`` where its slot says, making what is missing on the way."""
    containers, leaf = slot.place
    value = tensor if slot.buffer else nn.Parameter(tensor, requires_grad=slot.trainable)
    holder: Any = _container(home, containers, nn.ModuleDict if leaf else AdapterTensors)
    if not leaf:
        holder[adapter] = value
        if slot.buffer and not slot.saved:
            holder._non_persistent_buffers_set.add(adapter)
        return
    module = holder._modules.get(adapter)
    if module is None:
        module = new_leaf()
        module.training = home.training
        holder._modules[adapter] = module
    if slot.buffer:
        module._buffers[leaf] = value
        if not slot.saved:
            module._non_persistent_buffers_set.add(leaf)
    else:
        module._parameters[leaf] = value


def _mount_shared(plan: Plan, state: State, tensors: dict[str, Tensor], undo: list[Undo]) -> None:
    """Hang shared tensors below the state, and register them at the model's root."""

    def back() -> None:
        drop_shared(state, plan.shared, plan.adapter)
        register_shared(plan.model, state)

    undo.append(back)
    for role, tensor in tensors.items():
        _hang(state.shared, plan.adapter, plan.shared[role], tensor, nn.Module)
    register_shared(plan.model, state)


def drop_shared(state: State, slots: dict[str, Slot], adapter: str) -> None:
    """Drop an adapter's shared tensors."""
    for slot in slots.values():
        _drop(state.shared, slot.place[0], adapter)


def _container(layer: nn.Module, path: tuple[str, ...], cls: type[nn.Module]) -> nn.Module:
    """Return the container at a path below a layer, making what is missing."""
    holder = layer
    for depth, part in enumerate(path):
        found = holder._modules.get(part)
        if found is None:
            found = cls() if depth == len(path) - 1 else nn.Module()
            holder._modules[part] = found
        holder = found
    return holder


def dismount(layer: AdaptedLayer, adapter: str) -> None:
    """Drop everything that an adapter has at a layer; containers that end empty go too."""
    for entry in layer.entries.pop(adapter, ()):
        paths = [containers for _, containers, _ in entry.places]
        if entry.method.dropout_field is not None:
            paths.append((entry.method.dropout_field,))
        for path in paths:
            _drop(layer, path, adapter)


def _drop(layer: nn.Module, path: tuple[str, ...], adapter: str) -> None:
    holders = [layer]
    for part in path:
        found = holders[-1]._modules.get(part)
        if found is None:
            return
        holders.append(found)
    last = holders[-1]
    for table in (last._modules, last._parameters, last._buffers):
        table.pop(adapter, None)
    last._non_persistent_buffers_set.discard(adapter)
    for depth in range(len(path), 0, -1):
        held = holders[depth]
        if held._modules or held._parameters or held._buffers:
            break
        del holders[depth - 1]._modules[path[depth - 1]]


def _copy_module(place: object, adapter: str, state: State, undo: list[Undo]) -> None:
    """Give an adapter its full copy of a module."""
    from inlay.core.targets import Place

    assert isinstance(place, Place)
    here = place.module
    if isinstance(here, ModuleCopies):
        copies = here
    else:
        copies = ModuleCopies(place.path, here, state)

        def back() -> None:
            for parent, name in place.parents:
                setattr(parent, name, here)
            state.leave(copies)

        undo.append(back)
        for parent, name in place.parents:
            setattr(parent, name, copies)
    undo.append(lambda: copies.modules_to_save._modules.pop(adapter, None))
    copies.add(adapter)
    for parameter in copies.modules_to_save._modules[adapter].parameters():
        parameter.requires_grad_(True)


def _tie_copies(plan: Plan) -> None:
    """Let the full copies of tied layers share their weight, as the originals do."""
    for pair in plan.ties:
        standing: list[Any] = [place.parents[0][0]._modules[place.parents[0][1]] for place in pair]
        source, member = (copies.modules_to_save._modules[plan.adapter] for copies in standing)
        member._parameters["weight"] = source._parameters["weight"]


@torch.no_grad()
def _prepare(plan: Plan, state: State, undo: list[Undo]) -> None:
    """Let methods set initial values that depend on the base weight."""
    for placement in plan.placements:
        if not placement.method.needs_base or placement.device.type == "meta" or placement.source is not None:
            continue
        layer = _standing(placement)
        assert layer is not None
        for entry in layer.entries[plan.adapter]:
            if entry.method is placement.method:
                base = layer.base_affine(whole=True)
                dtype = merge_dtype(base.weight.dtype)
                wide = type(base)(base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype))
                p = layer.params(entry, whole=True)
                rebased = entry.method.prepare(entry.site, p, wide)
                layer.put(entry, p)
                if rebased is not None:
                    _rebase(layer, rebased, state, undo)


def _rebase(layer: AdaptedLayer, rebased: Affine, state: State, undo: list[Undo]) -> None:
    """Write the new base that an initialiser asks for, recording the old one."""
    leaf = layer.leaf_layer
    new = layer.kind.stored(leaf, layer.site, rebased)
    old = {name: getattr(leaf, name).detach().clone() for name in new}
    for name, tensor in old.items():
        key = f"{layer.site.owner}.{name}"
        if key not in state.base_values:
            undo.append(partial(state.base_values.pop, key))
            state.base_values[key] = tensor
    undo.append(lambda: layer.write(old, (), {}))
    layer.write(new, (), {})


def _standing(placement: Placement) -> AdaptedLayer | None:
    """Return the adapted layer at a place, from an earlier adapter or an earlier placement of this plan."""
    parent, name = placement.place.parents[0]
    layer = parent._modules[name]
    while isinstance(layer, AdaptedLayer):
        if layer.site.parameter == placement.site.parameter:
            return layer
        layer = layer.base_layer
    return None


def adapter_parameters(state: State, names: Iterable[str]) -> list[nn.Parameter]:
    """Return every parameter of the named adapters, full copies included."""
    wanted = set(names)
    found: dict[int, nn.Parameter] = {}
    for layer in state.layers():
        if isinstance(layer, ModuleCopies):
            for name in wanted & layer.modules_to_save._modules.keys():
                for parameter in layer.modules_to_save._modules[name].parameters():
                    found[id(parameter)] = parameter
            continue
        for name in wanted & layer.entries.keys():
            for entry in layer.entries[name]:
                for _, containers, leaf in entry.places:
                    tensor = find_tensor(entry.home if entry.home is not None else layer, name, containers, leaf)
                    if isinstance(tensor, nn.Parameter):
                        found[id(tensor)] = tensor
    for name in wanted:
        for slot in state.records[name].shared.values():
            tensor = find_tensor(state.shared, name, *slot.place)
            if isinstance(tensor, nn.Parameter):
                found[id(tensor)] = tensor
    return list(found.values())


def set_trainable(state: State, names: Iterable[str], trainable: bool = True) -> None:
    """Switch gradients of adapters on or off; slots that never train stay off."""
    names = list(names)
    for name in names:
        state.record(name)
    fixed = _fixed(state, names) if trainable else set()
    for parameter in adapter_parameters(state, names):
        if id(parameter) not in fixed and parameter.is_floating_point():
            parameter.requires_grad_(trainable)


def _fixed(state: State, names: list[str]) -> set[int]:
    """Ids of parameters whose slots say that they never train."""
    fixed: set[int] = set()
    for layer in state.layers():
        if isinstance(layer, ModuleCopies):
            continue
        for name in names:
            for entry in layer.entries.get(name, ()):
                values = layer.params(entry).__dict__
                fixed |= {
                    id(values[role]) for role, slot in entry.method.slots(entry.site).items() if not slot.trainable
                }
    return fixed


def set_active(state: State, names: Iterable[str], trainable: bool | None = None) -> None:
    """Activate adapters, in this order; every layer follows.

    Args:
        trainable: whether the active ones get gradients and the others lose them; None leaves gradients alone.
    """
    wanted = tuple(names)
    for name in wanted:
        state.record(name)
    if len(set(wanted)) < len(wanted):
        raise StateError(f"an adapter can be active once only, found {list(wanted)}")
    for layer in state.layers():
        if isinstance(layer, AdaptedLayer):
            layer.check_active(wanted)
    for layer in state.layers():
        layer.follow()
    state.active = wanted
    state.touch()
    if trainable is not None:
        set_trainable(state, [name for name in state.records if name not in wanted], False)
        set_trainable(state, wanted, trainable)


def delete(model: nn.Module, state: State, name: str) -> None:
    """Remove one adapter; layers that end without any are taken out too.

    Raises:
        UnknownAdapterError: there is no such adapter.
        MergeError: it is merged.
    """
    state.record(name)
    for layer in state.layers():
        if name in layer._merged:
            raise MergeError(f"adapter {name!r} is merged into {layer.site.name!r}; unmerge it before deleting it")
    for layer in list(state.layers()):
        if isinstance(layer, ModuleCopies):
            layer.modules_to_save._modules.pop(name, None)
        else:
            dismount(layer, name)
    _take_out_empty(model, state)
    restore_readers(model)
    if len(state.records) == 1:
        _end_replication(model, state)
    drop_shared(state, state.records.pop(name).shared, name)
    register_shared(model, state)
    state.active = tuple(active for active in state.active if active != name)
    state.touch()


def _take_out_empty(model: nn.Module, state: State) -> None:
    """Put the original module back where no adapter is left."""
    for place in places(model):
        if isinstance(place.module, AdaptedLayer) and not place.module.entries:
            refuse_shell(place.path, place.module)
            original = _lowered(place.module, restore=False)
        elif isinstance(place.module, ModuleCopies) and not place.module.modules_to_save._modules:
            original = place.module.original_module
        else:
            continue
        for parent, name in place.parents:
            setattr(parent, name, original)
        state.leave(place.module)


def eject(model: nn.Module, state: State, *, restore: bool = True) -> nn.Module:
    """Take every adapter out: the original modules stand where they stood.

    Args:
        restore: also give back what training changed in the base (biases); False keeps it, as after a merge.
    """
    everything = places(model)
    for place in everything:
        if isinstance(place.module, AdaptedLayer):
            refuse_shell(place.path, place.module)
    settle()
    for place in everything:
        if isinstance(place.module, AdaptedLayer):
            original = _lowered(place.module, restore)
        elif isinstance(place.module, ModuleCopies):
            original = place.module.original_module if restore else place.module.current()
        else:
            continue
        for parent, name in place.parents:
            setattr(parent, name, original)
    restore_readers(model)
    _end_replication(model, state)
    _restore_grad(model, state.base_grad)
    if restore and state.base_values:
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state.base_values.items():
                named[name].copy_(scatter(value, named[name]))
    state.records.clear()
    state.active = ()
    unregister_shared(model, state)
    state.shared._modules.clear()
    state.base_values.clear()
    state._layers.clear()
    state.touch()
    return model


def _end_replication(model: nn.Module, state: State) -> None:
    if state.replication is not None:
        state.replication.restore(model)
        state.replication = None


def _lowered(layer: AdaptedLayer, restore: bool) -> nn.Module:
    """Return the base layer, with what tensor parallelism hangs on it, and unmerged if it is to be restored."""
    if restore:
        layer.restore()
    below = layer.base_layer
    lower(layer, below)
    return _lowered(below, restore) if isinstance(below, AdaptedLayer) else below


def _restore_grad(model: nn.Module, before: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        flag = before.get(_clean(name))
        if flag is not None:
            parameter.requires_grad_(flag)
