"""How a plan prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from inlay.config.types import method_name

if TYPE_CHECKING:
    from inlay.core.plan import Placement, Plan

__all__ = ["human_bytes", "plan_table", "table"]

_ROWS = 12  # sites of one look that are printed before the rest is counted


def human_bytes(count: float) -> str:
    """Return a number of bytes for people to read, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: frozenset[int] = frozenset()) -> list[str]:
    """Lay out rows in columns; the columns named in ``right`` are flush right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    rule = tuple("-" * width for width in widths)
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, rule, *rows]
    ]


def plan_table(plan: Plan) -> str:
    """Return a plan as text: patterns and what they matched, sites, totals, bytes, and what matched nothing."""
    config = plan.config
    lines = [f"{method_name(config.peft_type)} {plan.adapter!r} on {type(plan.model).__name__}", ""]
    lines += table(
        ("pattern", "matches", "first"),
        [(pattern, str(len(paths)), paths[0]) for pattern, paths in plan.matched.items()],
        frozenset({1}),
    )
    lines.append("")
    rows = [_row(placement) for placement in plan.placements]
    rows += [
        (place.path, "full copy", type(place.base).__name__, "", f"{sum(p.numel() for p in place.base.parameters()):,}")
        for place, _ in plan.copies
    ]
    lines += table(("site", "kind", "weight", "rank", "parameters"), rows[:_ROWS], frozenset({3, 4}))
    if len(rows) > _ROWS:
        lines.append(f"... and {len(rows) - _ROWS} more sites")
    if plan.shared:
        shared = sum(slot.numel for slot in plan.shared.values())
        lines.append(f"shared by all sites: {', '.join(plan.shared)} ({shared:,} numbers)")
    trainable = plan.trainable
    total = plan.total + trainable
    lines += [
        "",
        f"sites                 {len(rows):,}",
        f"trainable parameters  {trainable:,} of {total:,} ({100 * trainable / max(1, total):.4f} %)",
        f"adapter bytes         {human_bytes(plan.nbytes)}",
        f"gradient bytes        {human_bytes(plan.gradient_bytes)}",
        f"optimiser bytes       {human_bytes(plan.optimiser_bytes)} (two moments in float32, as Adam keeps)",
    ]
    if plan.base_bytes:
        kept = human_bytes(plan.base_bytes)
        lines.append(f"base bytes kept       {kept} (in host memory, because the start changes these weights)")
    if plan.biases:
        lines.append(f"base biases that train, and are kept to be restored: {len(plan.biases):,}")
    for pattern, near in plan.unmatched.items():
        lines.append(f"NOTHING MATCHED       {pattern}" + (f" (near: {', '.join(near)})" if near else ""))
    return "\n".join(lines)


def _row(placement: Placement) -> tuple[str, ...]:
    site = placement.site
    shape = (*site.experts, site.out, site.channels, *site.kernel)
    rank = placement.options.get("r")
    name = site.name if site.parameter is None else f"{site.name}.{site.parameter}"
    return name, site.kind, "x".join(map(str, shape)), "" if rank is None else str(rank), f"{placement.numel:,}"
