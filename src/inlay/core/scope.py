"""``scope``: the part of a model that a configuration is about."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.core.targets import Place
from inlay.errors import TargetError, did_you_mean

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["within"]


def within(made: Plan, everything: list[Place]) -> list[Place]:
    """Return the places at or below the path that the config's ``scope`` names; all of them without one.

    Raises:
        TargetError: the model has no such path.
    """
    scope: str | None = getattr(made.config, "scope", None)
    if scope is None:
        return everything
    below = f"{scope}."
    found = [
        place
        for place in everything
        if any(path == scope or path.startswith(below) for path in (place.path, *place.aliases))
    ]
    if not found:
        paths = [path for place in everything for path in (place.path, *place.aliases)]
        raise TargetError(
            f"scope: {type(made.model).__name__} has no module {scope!r}; it is the dotted path of one from the "
            f"model's root.{did_you_mean(scope, paths)}"
        )
    return found
