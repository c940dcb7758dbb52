"""Creating the tensors that a plan asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.core.plan import Placement, Plan
from inlay.core.sliced import own_method
from inlay.core.slot import Slot, generator_for, zeros
from inlay.parallel.placement import spread

__all__ = ["build", "build_shared"]

_META = torch.device("meta")
_CPU = torch.device("cpu")


def _new(slot: Slot, site: Site, dtype: torch.dtype, device: torch.device, plan: Plan, seed: int, fill: bool) -> Tensor:
    """Create one tensor; initial values are always drawn on the CPU."""
    dtype = slot.dtype or dtype
    if device.type == "meta" or not fill:
        return torch.empty(*slot.sizes, dtype=dtype, device=device)
    if slot.init is zeros:
        return torch.zeros(*slot.sizes, dtype=dtype, device=device)
    if plan.policy.own_seed:
        tensor = _filled(slot, site, dtype, seed)
    else:
        tensor = torch.empty(*slot.sizes, dtype=dtype, device=_CPU)
        slot.init(tensor, torch.default_generator)
    return tensor if device.type == "cpu" else tensor.to(device)


def _filled(slot: Slot, site: Site, dtype: torch.dtype, seed: int) -> Tensor:
    """Create one tensor on the CPU with values that depend on seed, site and slot alone."""
    if slot.init is zeros:
        return torch.zeros(*slot.sizes, dtype=dtype, device=_CPU)
    tensor = torch.empty(*slot.sizes, dtype=dtype, device=_CPU)
    slot.init(tensor, generator_for(seed, site.name, slot.key))
    return tensor


def build(plan: Plan, placement: Placement, low_memory: bool, fill: bool, seed: int) -> dict[str, Tensor]:
    """Create the tensors of one placement, by role; none where it uses those of another layer."""
    if placement.source is not None:
        return {}
    site, dtype, layout = placement.site, placement.dtype, placement.layout
    own_seed = plan.policy.own_seed
    if own_seed and not low_memory and layout is None and placement.device == _CPU:  # the usual case, with few calls
        return {
            role: _filled(slot, site, slot.dtype or dtype, seed)
            if fill or slot.buffer or not slot.saved
            else torch.empty(*slot.sizes, dtype=slot.dtype or dtype, device=_CPU)
            for role, slot in placement.own.items()
        }
    if fill and not low_memory and not own_seed:
        for slot in placement.slots.values():
            if slot.discarded is not None:
                slot.discarded(torch.empty(*slot.sizes, dtype=placement.dtype), torch.default_generator)
    tensors = {}
    for role, slot in (placement.own if own_seed else placement.slots).items():  # PEFT draws what it then replaces
        device = _META if low_memory and slot.saved else placement.device  # no load would bring the others
        tensor = _new(slot, site, dtype, device, plan, seed, fill or slot.buffer or not slot.saved)
        tensors[role] = tensor if layout is None else spread(tensor, slot, layout)
    return tensors


def build_shared(plan: Plan, low_memory: bool, seed: int) -> dict[str, Tensor]:
    """Create the tensors that live at the root, on the device of the first site."""
    if not plan.shared:
        return {}
    first = next(p for p in plan.placements if own_method(p.method) is plan.method)
    tensors = {}
    for role, slot in plan.shared.items():
        device = _META if low_memory and slot.saved else first.device
        tensors[role] = _new(slot, Site("", "shared", 0, 0), first.dtype, device, plan, seed, True)
    layout = next((p.layout for p in plan.placements if p.layout is not None), None)
    if layout is not None:  # plain in every process, because layers beside it may not be spread at all
        tensors = {role: layout.agree(tensor) for role, tensor in tensors.items()}
    return tensors
