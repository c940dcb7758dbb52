"""The table: one line for each target of each row, with the ratios over the floor and over peft beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from benchmarks.harness import Figure, Row, Target

HEADINGS = ("row", "figure", "gate", "goal", "measured", "spread", "peft", "verdict")
COLOURS = {"goal": "green", "gate": "cyan", "missed": "red", "-": "dim"}


def number(value: float, unit: str = "") -> str:
    """Three significant digits with the unit: ``1.24x``, ``17.7 MiB``, ``1.3e-03``, ``0.2 ms``."""
    if unit == "B":
        for name, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
            if abs(value) >= size:
                return f"{value / size:.3g} {name}" if abs(value) < 1000 * size else f"{value / size:.0f} {name}"
        return f"{value:.0f} B"
    if unit == "s":
        for name, size in (("s", 1.0), ("ms", 1e-3)):
            if value >= size:
                return f"{value / size:.3g} {name}"
        return f"{value / 1e-6:.3g} us"
    if unit == "rel":
        return f"{value:.1e}" if value else "0"
    if unit == "" and value == int(value):
        return str(int(value))
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3 if unit == "x" and 0.9 < value < 1.1 else 2
    return f"{value:.{digits}f}" + (unit if unit in ("", "x") else f" {unit}")


def bound(target: Target, value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{'>=' if target.least else '<='} {f'{value:g}x' if unit == 'x' else number(value, unit)}"


def spread(figure: Figure | None) -> str:
    if figure is None or figure.low is None or figure.high is None:
        return ""
    return f"{number(figure.low, figure.unit)} - {number(figure.high, figure.unit)}"


def of_peft(target: Target, figures: Mapping[str, Figure]) -> str:
    """Peft's figure where ours is ``target.of``: the same name with ``peft`` in the place of ``inlay``."""
    other = figures.get(target.of.replace("inlay", "peft", 1)) if "peft" not in target.of else None
    return number(other.value, other.unit) if other else ""


def lines(row: Row, figures: Mapping[str, Figure], failed: str | None = None) -> Iterable[tuple[str, ...]]:
    """The cells under ``HEADINGS``, one tuple for each target; the ratio over peft follows where no target asks it."""
    first = row.name
    for target in row.targets:
        figure = figures.get(target.of)
        unit = figure.unit if figure else target.unit
        yield (
            first,
            target.of,
            bound(target, target.gate, unit),
            bound(target, target.goal, unit),
            number(figure.value, unit) if figure else failed or "",
            spread(figure),
            of_peft(target, figures),
            target.verdict(figure.value if figure else None),
        )
        first = ""
    asked = {target.of for target in row.targets}
    for name in ("inlay / floor", "peft / inlay"):
        if name in figures and name not in asked:
            figure = figures[name]
            peft = of_peft(Target(name, None, None, False), figures)
            yield (first, name, "", "", number(figure.value, figure.unit), spread(figure), peft, "")
            first = ""


def show(table: Iterable[tuple[Row, Mapping[str, Figure], str | None]]) -> None:
    """Print the table on stdout: drawn on a terminal, tab-separated otherwise."""
    entries = [cells for row, figures, failed in table for cells in lines(row, figures, failed)]
    if not sys.stdout.isatty():
        for cells in (HEADINGS, *entries):
            print("\t".join(cells))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*HEADINGS)
    for cells in entries:
        drawn.add_row(*cells, style=COLOURS.get(cells[-1]), end_section=False)
    Console().print(drawn)
