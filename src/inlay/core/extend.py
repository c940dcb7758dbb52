"""What a config asks for beside its target modules: parameters, token rows, tied layers, companions of a layer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from inlay.core.copies import check_copies, plan_copies, tie_copies
from inlay.core.parameter import plan_parameters
from inlay.core.patterns import matcher
from inlay.core.registry import method_class
from inlay.core.scope import within
from inlay.core.targets import Place, places
from inlay.core.tied import Group, owners, tied_groups, tied_placement, warn_untied
from inlay.errors import ConfigError, ConfigTypeError, InlayWarning, TargetError, did_you_mean

if TYPE_CHECKING:
    from inlay.core.plan import Placement, Plan

__all__ = ["extend_plan", "plan_extras", "plan_tokens", "readable", "without_companions"]

# where the model does not say which layer embeds its input
_TABLES = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared")


def extend_plan(made: Plan, everything: list[Place]) -> None:
    """Add placements for what the config's shared fields ask for."""
    holders = owners(everything)
    groups = tied_groups(everything, holders)
    _tie_targets(made, groups)
    plan_tokens(made, everything, groups)
    _plan_companions(made, everything)
    plan_parameters(made, within(made, everything))
    for placement in made.placements if holders else ():
        weight = placement.place.base._parameters.get(placement.kind.weight_name)
        held = holders.get(id(weight), ())
        placement.shares = tuple(p.path for p in held if p is not placement.place)


def plan_extras(made: Plan) -> None:
    """Find what a config trains beside its method's own layers, for a method that puts those in by itself.

    Raises:
        what :func:`inlay.core.plan.plan` raises.
    """
    everything = places(made.model)
    plan_copies(made, everything)
    plan_tokens(made, everything)
    tie_copies(made, everything)
    check_copies(made)


# -- attention --------------------------------------------------------------------------------------------------------


def readable(paths: set[str], everything: list[Place]) -> set[str]:
    """Put an attention layer in the place of its output projection, which it reads and never calls."""
    changed = set(paths)
    for place in everything:
        for parent, _ in place.parents:
            if isinstance(parent, nn.MultiheadAttention) and place.path in paths:
                changed.discard(place.path)
                changed.add(place.path.rpartition(".")[0])
    return changed


def without_companions(chosen: list[tuple[Place, str]]) -> list[tuple[Place, str]]:
    """Drop the output projections of attention layers that are chosen themselves: they come along with them."""
    attention = {id(place.base) for place, _ in chosen if isinstance(place.base, nn.MultiheadAttention)}
    if not attention:
        return chosen
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
    for place in everything if attention else ():
        owner = next((attention[id(p)] for p, name in place.parents if id(p) in attention and name == "out_proj"), None)
        if owner is None:
            continue
        site = Output().site(place.path, place.base)
        if not made.policy.prefix_patterns:  # PEFT gives both parts what its patterns say of the attention layer
            site = replace(site, patterns=owner.place.path)
        made.placements.append(place_method(made, place, owner.pattern, owner.method, Output(), site))


# -- layers that share a weight ---------------------------------------------------------------------------------------


def _tie_targets(made: Plan, groups: list[Group]) -> None:
    """Adapt tied layers together: the embedding with tensors, the others with the same ones.

    A method that puts one number on one row, such as trainable tokens, is tied without being asked.
    """
    from inlay.core.plan import place_method

    asked = bool(getattr(made.config, "ensure_weight_tying", False))
    always = made.method.ties
    tied = False
    for group in groups:
        chosen = {id(p.place.base): p for p in made.placements if id(p.place.base) in group.ids}
        if not chosen:
            continue
        tied = True
        if not (asked or always):
            warn_untied(made, group, "so this adapter cannot be merged")
            continue
        first = next(iter(chosen.values()))
        source = chosen.get(id(group.source.base))
        if not always and source is not None and len(chosen) == 1 and _trained_apart(made, source, group):
            continue
        made.placements[:] = [p for p in made.placements if id(p.place.base) not in group.ids or p is source]
        if source is None:
            source = place_method(made, group.source, first.pattern, first.method)
            made.placements.append(source)
        made.placements += _followers(made, source, group)
    if not asked:
        return
    if not groups:
        warnings.warn("ensure_weight_tying: no layer shares the weight of an embedding", InlayWarning, stacklevel=5)
    elif not (tied or made.copies or getattr(made.config, "trainable_token_indices", None)):
        warnings.warn(
            f"ensure_weight_tying: none of the layers that share a weight ({groups[0]}) is adapted",
            InlayWarning,
            stacklevel=5,
        )


def _trained_apart(made: Plan, source: Placement, group: Group) -> bool:
    """Whether a checkpoint has an embedding's factors and none for the layers that share its weight.

    PEFT 0.18 never tied adapters of layers, and later releases tie those with certain names only; what they tie, they
    write under every name.
    """
    if not made.keys or source.slots.keys() != {"A", "B"}:
        return False
    return not any(f"{place.path}.lora_" in key for key in made.keys for place in group.members)


def _followers(made: Plan, source: Placement, group: Group) -> list[Placement]:
    found = (tied_placement(made, source, place) for place in group.members)
    return [placement for placement in found if placement is not None]


# -- token rows -----------------------------------------------------------------------------------------------------


def plan_tokens(made: Plan, everything: list[Place], groups: list[Group] | None = None) -> None:
    """Add the token rows that train beside another method."""
    wanted = getattr(made.config, "trainable_token_indices", None)
    if not wanted:
        return
    groups = tied_groups(everything) if groups is None else groups
    by_place: dict[int, tuple[Place, list[int], str]] = {}
    if isinstance(wanted, dict):
        for name, indices in wanted.items():
            match = matcher([name])
            found = [place for place in everything if match(place.path) is not None]
            if not found:
                hint = did_you_mean(name, [place.path.rpartition(".")[2] for place in everything])
                raise TargetError(f"trainable_token_indices: {name!r} matches nothing.{hint}")
            for place in found:
                by_place[id(place.base)] = (place, list(indices), name)
    else:
        place = _input_table(made, everything)
        by_place[id(place.base)] = (place, list(wanted), place.path)
    sources = {id(group.source.base) for group in groups}
    for key in sorted(by_place, key=lambda key: key not in sources):
        if key not in by_place:
            continue
        place, indices, name = by_place[key]
        source = _place_tokens(made, place, indices, name)
        group = next((g for g in groups if g.source is place), None)
        if group is None:
            continue
        differing = [m for m in group.members if by_place.get(id(m.base), (m, indices))[1] != indices]
        if differing and getattr(made.config, "ensure_weight_tying", False):
            raise ConfigError(
                f"trainable_token_indices: {place.path!r} and {differing[0].path!r} share one weight but name "
                "different tokens; name the same ones, or set ensure_weight_tying=False"
            )
        same = Group(group.source, [m for m in group.members if m not in differing])
        made.placements += _followers(made, source, same)
        for member in same.members:
            by_place.pop(id(member.base), None)


def _input_table(made: Plan, everything: list[Place]) -> Place:
    """Return the layer that embeds the model's input."""
    getter: Any = getattr(made.model, "get_input_embeddings", None)
    try:
        table = getter() if callable(getter) else None
    except NotImplementedError:
        table = None
    for place in everything:
        if table is not None and table in (place.module, place.base):
            return place
    for name in _TABLES:
        for place in everything:
            if place.path.rpartition(".")[2] == name and isinstance(place.base, nn.Embedding):
                return place
    raise TargetError(
        "trainable_token_indices: the model does not say which layer embeds its input (get_input_embeddings), and none "
        f"is called {', '.join(map(repr, _TABLES))}; give a dict of layer name -> indices"
    )


def _place_tokens(made: Plan, place: Place, indices: list[int], name: str) -> Placement:
    from inlay.core.plan import place_method

    if made.policy.peft_layers and any(p.place is place for p in made.placements):
        raise ConfigTypeError(
            f"trainable_token_indices: {place.path!r} is a target of {type(made.config).__name__} too, which PEFT does "
            "not take"
        )
    tokens: Any = method_class("TRAINABLE_TOKENS")
    method = tokens(tokens.config_class(token_indices=indices), under="token_adapter.")
    placement = place_method(made, place, name, method)
    made.placements.append(placement)
    made.matched.setdefault(name, []).append(place.path)
    return placement
