"""What a method says of a site, asked once for all sites that it treats alike."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from inlay.core.affine import Site
from inlay.core.entry import Roles
from inlay.core.method import Method
from inlay.core.slot import Slot

__all__ = ["Answers", "Hung", "Known", "Slots", "ask"]


class Hung(NamedTuple):
    """Where one slot's tensor hangs; ``plain`` in a module of the adapter's, in one container right below the layer."""

    role: str
    slot: Slot
    containers: tuple[str, ...]
    leaf: str
    plain: bool


class Slots(dict[str, Slot]):
    """Slots by role; knows where their tensors hang."""

    @cached_property
    def hung(self) -> tuple[Hung, ...]:
        return tuple(Hung(role, slot, *slot.place, _is_plain(slot)) for role, slot in self.items())

    @cached_property
    def roles(self) -> Roles:
        return Roles.of(self)


def _is_plain(slot: Slot) -> bool:
    containers, leaf = slot.place
    return bool(leaf) and "." not in leaf and len(containers) == 1 and not slot.buffer


@dataclass(slots=True)
class Answers:
    """What a method says of a site; there are no slots where it refuses.

    Attributes:
        slots: the tensors there, by role.
        options: the numbers there.
        refusal: why the method cannot work there, or None.
        note: what is done otherwise than the config says, or None.
    """

    slots: Slots
    options: dict[str, Any]
    refusal: str | None = None
    note: str | None = None


Known = dict[tuple[Method, Hashable], Answers]


def ask(method: Method, site: Site, known: Known) -> Answers:
    """Return what a method says of a site, from ``known`` if it said so of one like it."""
    key = (method, method.alike(site))
    answers = known.get(key)
    if answers is None:
        refusal = method.refuse(site)
        if refusal is not None:
            return Answers(Slots(), {}, refusal)
        answers = known[key] = Answers(Slots(method.slots(site)), method.options(site), None, method.note(site))
    return answers
