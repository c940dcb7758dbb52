"""What a config asks for beside its target modules: parameters, token rows, tied layers, companions of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.core.targets import Place

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["extend_plan"]


def extend_plan(made: Plan, everything: list[Place]) -> None:
    """Add placements for what the config's shared fields ask for."""
