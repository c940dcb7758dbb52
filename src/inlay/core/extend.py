"""What a config asks for beside its target modules: parameters, token rows, tied layers, companions of a layer."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from inlay.core.parameter import plan_parameters
from inlay.core.targets import Place

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["extend_plan", "readable", "without_companions"]


def extend_plan(made: Plan, everything: list[Place]) -> None:
    """Add placements for what the config's shared fields ask for."""
    _plan_companions(made, everything)
    plan_parameters(made, everything)


def readable(paths: set[str], everything: list[Place]) -> set[str]:
    """Put an attention layer in the place of its output projection, which it reads and never calls."""
    changed = set(paths)
    for place in everything:
        for parent, _ in place.parents:
            if place.path in paths and isinstance(parent, nn.MultiheadAttention):
                changed.discard(place.path)
                changed.add(place.path.rpartition(".")[0])
    return changed


def without_companions(chosen: list[tuple[Place, str]]) -> list[tuple[Place, str]]:
    """Drop the output projections of attention layers that are chosen themselves: they come along with them."""
    attention = {id(place.base) for place, _ in chosen if isinstance(place.base, nn.MultiheadAttention)}
    return [
        (place, pattern)
        for place, pattern in chosen
        if not any(id(parent) in attention and name == "out_proj" for parent, name in place.parents)
    ]


def _plan_companions(made: Plan, everything: list[Place]) -> None:
    """Adapt the output projection of every adapted attention layer."""
    from inlay.core.plan import place_method
    from inlay.kinds.attention import Output

    attention = {id(p.place.base): p for p in made.placements if isinstance(p.place.base, nn.MultiheadAttention)}
    for place in everything:
        owner = next((attention[id(p)] for p, name in place.parents if id(p) in attention and name == "out_proj"), None)
        if owner is None:
            continue
        site = Output().site(place.path, place.base)
        if not made.policy.prefix_patterns:  # PEFT gives both parts what its patterns say of the attention layer
            site = replace(site, patterns=owner.place.path)
        made.placements.append(place_method(made, place, owner.pattern, owner.method, Output(), site))
