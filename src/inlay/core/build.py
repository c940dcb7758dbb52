"""Creating the tensors that a plan asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.core.plan import Placement, Plan
from inlay.core.slot import Slot, generator_for
from inlay.parallel.placement import spread

__all__ = ["build", "build_shared"]


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


def build(plan: Plan, placement: Placement, low_memory: bool, fill: bool, seed: int) -> dict[str, Tensor]:
    if placement.source is not None:  # it uses the tensors of another layer
        return {}
    meta = torch.device("meta")
    layout = placement.layout
    if fill and not low_memory and not plan.policy.own_seed:
        for slot in placement.slots.values():
            if slot.discarded is not None:
                slot.discarded(torch.empty(slot.shape, dtype=placement.dtype), torch.default_generator)
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


def build_shared(plan: Plan, low_memory: bool, seed: int) -> dict[str, Tensor]:
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
