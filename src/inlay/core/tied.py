"""Layers that share one weight, as an embedding and the output head above it do, are adapted together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from inlay.core.affine import Affine, Delta, Dense, LowRank, Site
from inlay.core.around import Around
from inlay.core.kind import kind_of
from inlay.core.method import Method, P
from inlay.core.slot import Slot
from inlay.core.targets import Place
from inlay.errors import InlayWarning

if TYPE_CHECKING:
    from inlay.core.plan import Placement, Plan

__all__ = ["Group", "Tied", "owners", "tied_groups", "tied_placement", "warn_untied"]


@dataclass
class Group:
    """Layers that share a weight with an embedding.

    Attributes:
        source: the embedding, the first one in the model; it holds the adapter's tensors.
        members: the other layers.
    """

    source: Place
    members: list[Place]

    @property
    def places(self) -> list[Place]:
        return [self.source, *self.members]

    def __str__(self) -> str:
        return ", ".join(repr(place.path) for place in self.places)

    @property
    def ids(self) -> set[int]:
        return {id(place.base) for place in self.places}


def owners(everything: list[Place]) -> dict[int, list[Place]]:
    """Return the places that hold a parameter directly, by the parameter's id, of those that several places hold."""
    first: dict[int, Place] = {}
    shared: dict[int, list[Place]] = {}
    for place in everything:
        held = place.base._parameters
        for parameter in held.values() if held else ():
            if parameter is not None:
                known = first.setdefault(id(parameter), place)
                if known is not place:
                    shared.setdefault(id(parameter), [known]).append(place)
    return shared


def tied_groups(everything: list[Place], holders: dict[int, list[Place]] | None = None) -> list[Group]:
    """Return the groups of layers that share a weight with an embedding; ``holders`` is what :func:`owners` returns."""
    groups = []
    for places in (owners(everything) if holders is None else holders).values():
        tables = [place for place in places if isinstance(place.base, nn.Embedding)]
        if tables:
            groups.append(Group(tables[0], [place for place in places if place is not tables[0]]))
    return groups


def tied_placement(made: Plan, source: Placement, place: Place) -> Placement | None:
    """Return the placement that gives ``place`` the tensors of ``source``; None where no kind knows the layer."""
    kind = kind_of(place.base)
    if kind is None or not kind.activation:
        return None
    site = kind.site(place.path, place.base)
    method = source.method
    if {role: (slot.key, slot.shape) for role, slot in method.slots(site).items()} != {
        role: (slot.key, slot.shape) for role, slot in source.slots.items()
    }:
        method = Tied(method, source.site)
    return replace(source, place=place, site=site, kind=kind, method=method, source=source)


def warn_untied(made: Plan, group: Group, consequence: str) -> None:
    """Warn that a part of a group is adapted by itself."""
    way = (
        "set ensure_weight_tying=True to adapt them together"
        if hasattr(made.config, "ensure_weight_tying")
        else f"{type(made.method).__name__} cannot adapt them together"
    )
    message = f"{group} share one weight and are not adapted together, {consequence}; {way}"
    warnings.warn(message, InlayWarning, stacklevel=6)


class Tied(Around):
    """The adapter of an embedding, as a layer that shares the embedding's weight has it.

    Args:
        method: the embedding's method.
        source: the embedding's site. A layer that is no lookup sees its map transposed.
    """

    def __init__(self, method: Method, source: Site) -> None:
        super().__init__(method)
        self.source = source

    @property
    def additive(self) -> bool:
        return self.method.additive

    def slots(self, site: Site) -> dict[str, Slot]:
        """Return what the method would have here: the names that PEFT's checkpoints also hold."""
        here = self.method.slots(site)
        return {role: slot for role, slot in here.items() if role in self.method.slots(self.source)}

    def options(self, site: Site) -> dict[str, Any]:
        return self.method.options(self.source)

    def conflict(self, site: Site, below: Method) -> str | None:
        return self.method.conflict(self.source, below.method if isinstance(below, Tied) else below)

    def delta(self, site: Site, p: P) -> Delta:
        delta = self.method.delta(self.source, p)
        if site.lookup == self.source.lookup:
            return delta
        if isinstance(delta, LowRank):
            return LowRank(delta.A.mT, delta.B.mT).scaled(delta.scale)
        return Dense(delta.dense().mT)

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        turned = site.lookup != self.source.lookup

        def turn(weight: Tensor) -> Tensor:
            return weight.mT if turned else weight

        result = self.method.rewrite(self.source, p, Affine(turn(layer.weight)), Affine(turn(base.weight)))
        return Affine(turn(result.weight), layer.bias)
