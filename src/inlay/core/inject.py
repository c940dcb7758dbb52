"""Apply a plan to its model, all or nothing, and take adapters out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.dtype import merge_dtype
from inlay.core.layer import AdaptedLayer, AdapterTensors, Entry
from inlay.core.mount import ModuleCopies
from inlay.core.plan import Placement, Plan
from inlay.core.slot import Slot, generator_for
from inlay.core.state import Record, State
from inlay.core.targets import places
from inlay.errors import StateError

__all__ = ["adapter_parameters", "delete", "eject", "inject", "set_active", "set_trainable"]

# One step back, should a later step of an injection fail.
Undo = Callable[[], object]


def inject(plan: Plan, *, low_memory: bool = False, seed: int | None = None, initialise: bool = True) -> State:
    """Put a planned adapter into its model, in place; the model ends unchanged if anything fails.

    Args:
        plan: from :func:`inlay.core.plan.plan`, for the model as it is now.
        low_memory: create the tensors on the meta device, to be assigned by a load.
        seed: what initial values are drawn from, together with site and slot; by default ``torch.initial_seed()``.
        initialise: False leaves initial values undefined, for a load that overwrites them.

    Returns:
        The model's state; the adapter is active if it is the first.

    Raises:
        StateError: the model was changed since it was planned.
    """
    seed = torch.initial_seed() if seed is None else seed
    state = plan.state or State(policy=plan.policy)
    undo: list[Undo] = []
    first = not state.records
    parameters = dict(plan.model.named_parameters())
    biases = {name: parameters[name] for name in plan.biases}
    try:
        if plan.adapter in state.records:
            raise StateError(f"adapter {plan.adapter!r} came after this plan was made; plan again")
        shared = _build_shared(plan, low_memory, seed)
        built = [(placement, _build(plan, placement, low_memory, initialise, seed)) for placement in plan.placements]
        if first:
            before = {_clean(name): p.requires_grad for name, p in parameters.items()}
            undo.append(lambda: _restore_grad(plan.model, before))
            state.base_grad = before
            for p in parameters.values():
                p.requires_grad_(False)
        for placement, tensors in built:
            layer = _adapted(placement, state, undo)
            _mount(layer, plan.adapter, placement, tensors, undo)
        for place, _ in plan.copies:
            _copy_module(place, plan.adapter, state, undo)
        if shared is not None:
            state.shared._modules[plan.adapter] = shared
            undo.append(lambda: state.shared._modules.pop(plan.adapter, None))
        state.records[plan.adapter] = Record(plan.config, plan.method, seed)
        undo.append(lambda: state.records.pop(plan.adapter, None))
        if initialise and not low_memory:
            _prepare(plan, state, undo)
        for name, p in biases.items():
            state.base_values.setdefault(_clean(name), p.detach().clone())
            p.requires_grad_(True)
        for name, value in plan.resolved.items():
            setattr(plan.config, name, value)
        if first:
            state.active = (plan.adapter,)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    state.touch()
    return state


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
    device = torch.device("meta") if low_memory else placement.device
    return {
        role: _new(slot, placement.site, placement.dtype, device, plan, seed, fill or slot.buffer)
        for role, slot in placement.slots.items()
    }


def _build_shared(plan: Plan, low_memory: bool, seed: int) -> nn.Module | None:
    """Create the tensors that live at the root, on the device of the first site."""
    if not plan.shared:
        return None
    first = next(p for p in plan.placements if p.method is plan.method)
    holder = AdapterTensors()
    for role, slot in plan.shared.items():
        device = torch.device("meta") if low_memory and slot.saved else first.device
        tensor = _new(slot, Site("", "shared", 0, 0), first.dtype, device, plan, seed, True)
        holder[role] = tensor if slot.buffer else nn.Parameter(tensor, requires_grad=slot.trainable)
        if slot.buffer and not slot.saved:
            holder._non_persistent_buffers_set.add(role)
    return holder


def _adapted(placement: Placement, state: State, undo: list[Undo]) -> AdaptedLayer:
    """Return the adapted layer at a place, putting one there if there is none."""
    here = placement.place.module
    if isinstance(here, AdaptedLayer):
        return here
    now = placement.place.parents[0][0]._modules.get(placement.place.parents[0][1])
    if isinstance(now, AdaptedLayer):  # an earlier placement of this plan
        return now
    layer = placement.kind.adapt(here, placement.site, state)
    for parent, name in placement.place.parents:
        setattr(parent, name, layer)

    def back() -> None:
        for parent, name in placement.place.parents:
            setattr(parent, name, here)
        state.leave(layer)

    undo.append(back)
    return layer


def _mount(
    layer: AdaptedLayer,
    adapter: str,
    placement: Placement,
    tensors: dict[str, Tensor],
    undo: list[Undo],
) -> None:
    """Hang an entry's tensors below the layer, where their slots say."""
    entry = Entry(adapter, placement.method, placement.site, placement.slots)
    field = placement.method.dropout_field
    if field is not None:
        p = float(getattr(placement.method.config, field) or 0.0)
        _container(layer, (field,), nn.ModuleDict)._modules[adapter] = nn.Dropout(p) if p > 0.0 else nn.Identity()
    for role, slot in placement.slots.items():
        containers, leaf = slot.place
        tensor = tensors[role]
        value = tensor if slot.buffer else nn.Parameter(tensor, requires_grad=slot.trainable)
        holder: Any = _container(layer, containers, nn.ModuleDict if leaf else AdapterTensors)
        if not leaf:
            holder[adapter] = value
            if slot.buffer and not slot.saved:
                holder._non_persistent_buffers_set.add(adapter)
            continue
        module = holder._modules.get(adapter)
        if module is None:
            module = placement.kind.leaf(placement.site, slot)
            module.training = layer.training
            holder._modules[adapter] = module
        if slot.buffer:
            module._buffers[leaf] = value
            if not slot.saved:
                module._non_persistent_buffers_set.add(leaf)
        else:
            module._parameters[leaf] = value
    layer.entries[adapter] = (*layer.entries.get(adapter, ()), entry)
    undo.append(lambda: dismount(layer, adapter))


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
        for parent, name in place.parents:
            setattr(parent, name, copies)

        def back() -> None:
            for parent, name in place.parents:
                setattr(parent, name, here)
            state.leave(copies)

        undo.append(back)
    copies.add(adapter)
    for parameter in copies.modules_to_save._modules[adapter].parameters():
        parameter.requires_grad_(True)
    undo.append(lambda: copies.modules_to_save._modules.pop(adapter, None))


@torch.no_grad()
def _prepare(plan: Plan, state: State, undo: list[Undo]) -> None:
    """Let methods set initial values that depend on the base weight."""
    for placement in plan.placements:
        if not placement.method.needs_base or placement.device.type == "meta":
            continue
        layer = _placed(placement)
        for entry in layer.entries[plan.adapter]:
            if entry.method is placement.method:
                base = layer.base_affine()
                dtype = merge_dtype(base.weight.dtype)
                wide = type(base)(base.weight.to(dtype), None if base.bias is None else base.bias.to(dtype))
                rebased = entry.method.prepare(entry.site, layer.params(entry), wide)
                if rebased is not None:
                    _rebase(layer, rebased, state, undo)


def _rebase(layer: AdaptedLayer, rebased: Affine, state: State, undo: list[Undo]) -> None:
    """Write the new base that an initialiser asks for, recording the old one."""
    leaf = layer.leaf_layer
    new = layer.kind.stored(leaf, layer.site, rebased)
    old = {name: getattr(leaf, name).detach().clone() for name in new}
    for name, tensor in old.items():
        state.base_values.setdefault(f"{layer.site.name}.{name}", tensor)
    undo.append(lambda: layer.write(old, (), {}))
    layer.write(new, (), {})


def _placed(placement: Placement) -> AdaptedLayer:
    parent, name = placement.place.parents[0]
    layer = parent._modules[name]
    assert isinstance(layer, AdaptedLayer)
    return layer


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
                    holder: Any = entry.home if entry.home is not None else layer
                    for part in containers:
                        holder = holder._modules[part]
                    tensor = getattr(holder._modules[name], leaf) if leaf else holder[name]
                    if isinstance(tensor, nn.Parameter):
                        found[id(tensor)] = tensor
    for name in wanted:
        module = state.shared._modules.get(name)
        if module is not None:
            for parameter in module.parameters():
                found[id(parameter)] = parameter
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
        layer.follow()
    state.active = wanted
    state.touch()
    if trainable is not None:
        set_trainable(state, [name for name in state.records if name not in wanted], False)
        set_trainable(state, wanted, trainable)


def delete(model: nn.Module, state: State, name: str) -> None:
    """Remove one adapter; layers that end without any are taken out too.

    Raises:
        StateError: it is merged.
    """
    state.record(name)
    for layer in state.layers():
        if name in layer._merged:
            raise StateError(f"adapter {name!r} is merged into {layer.site.name!r}; unmerge it before deleting it")
    for layer in list(state.layers()):
        if isinstance(layer, ModuleCopies):
            layer.modules_to_save._modules.pop(name, None)
        else:
            dismount(layer, name)
    state.shared._modules.pop(name, None)
    del state.records[name]
    state.active = tuple(active for active in state.active if active != name)
    state.touch()


def eject(model: nn.Module, state: State, *, restore: bool = True) -> nn.Module:
    """Take every adapter out: the original modules stand where they stood.

    Args:
        restore: also give back what training changed in the base (biases); False keeps it, as after a merge.
    """
    for place in places(model):
        if isinstance(place.module, AdaptedLayer):
            original = place.module.get_base_layer()
            if restore:
                place.module.restore()
        elif isinstance(place.module, ModuleCopies):
            original = place.module.original_module if restore else place.module.current()
        else:
            continue
        for parent, name in place.parents:
            setattr(parent, name, original)
    _restore_grad(model, state.base_grad)
    if restore and state.base_values:
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in state.base_values.items():
                named[name].copy_(value)
    state.records.clear()
    state.active = ()
    state.shared._modules.clear()
    state.base_values.clear()
    state._layers.clear()
    state.touch()
    return model


def _restore_grad(model: nn.Module, before: dict[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        flag = before.get(_clean(name))
        if flag is not None:
            parameter.requires_grad_(flag)
