"""Combining (IA)^3 adapters: the weighted sum of their factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from inlay.combine.configs import derived, united, united_targets
from inlay.combine.placing import carry, check_tied, entries, layers_of, plan_exactly, put
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.plan import Plan
from inlay.core.state import State
from inlay.errors import CombinationError

__all__ = ["add_ia3"]


def add_ia3(model: nn.Module, state: State, adapters: Sequence[str], weights: Sequence[float], name: str) -> None:
    """Combine (IA)^3 adapters into a new one; an adapter that leaves a layer out counts as factors of 1 there."""
    configs = [state.record(adapter).config for adapter in adapters]
    sides = _sides(model, adapters)
    made = _plan(model, configs, name, sides)

    def fill(state: State) -> None:
        check_tied(model, name, adapters)
        for layer in layers_of(model):
            for entry in entries(layer, name, "IA3"):
                if entry.home is None:
                    _fill_layer(layer, entry, adapters, weights)
        carry(model, state, name, adapters, weights)

    put(made, fill)


def _sides(model: nn.Module, adapters: Sequence[str]) -> dict[str, bool]:
    """Return, by site, whether the factors act on the input; the adapters must agree."""
    found: dict[str, tuple[str, bool]] = {}
    for layer in layers_of(model):
        for adapter in adapters:
            for entry in entries(layer, adapter, "IA3"):
                first, side = found.setdefault(entry.site.name, (adapter, entry.options["on_input"]))
                if side != entry.options["on_input"]:
                    raise CombinationError(
                        f"{entry.site.name!r}: {first!r} and {adapter!r} do not scale the same side of this layer, "
                        "which only one of them calls a feed-forward layer (feedforward_modules)"
                    )
    return {site: side for site, (_, side) in found.items()}


def _plan(model: nn.Module, configs: list[Any], name: str, sides: dict[str, bool]) -> Plan:
    given = united_targets(configs, "target_modules")
    forward = united_targets(configs, "feedforward_modules")
    copies = united(configs, "modules_to_save")
    names = {site for site, side in sides.items() if side}
    for targets, feedforward in ((given, forward), (set(sides), names)):
        config = derived(configs[0], target_modules=targets, feedforward_modules=feedforward, modules_to_save=copies)
        made = plan_exactly(model, config, name, set(sides), autocast=True)
        placed = {p.site.name: p.options["on_input"] for p in made.placements if p.site.name in sides}
        if placed == sides:
            return made
    raise CombinationError(
        "feedforward_modules of the adapters, put together, mean other layers than each of them alone; name the "
        "modules by longer paths"
    )


def _fill_layer(layer: AdaptedLayer, entry: Entry, adapters: Sequence[str], weights: Sequence[float]) -> None:
    p = layer.params(entry, whole=True)
    total = torch.zeros_like(p.factors)
    for adapter, weight in zip(adapters, weights, strict=True):
        held = entries(layer, adapter, "IA3")
        for other in held:
            total += weight * layer.params(other, whole=True).factors.detach()
        if not held:
            total += weight
    p.factors.copy_(total)
    layer.put(entry, p)
