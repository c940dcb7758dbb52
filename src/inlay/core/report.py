"""How plans print."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["plan_table"]


def plan_table(plan: Plan) -> str:
    """Return a plan as text."""
    return ""
