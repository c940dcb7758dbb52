"""The plot of docs/performance.md, drawn from the saved results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import catalogue
from benchmarks.harness import Figure, Target

OURS, THEIRS = "#1764ab", "#d95f02"


def draw(path: Path) -> None:
    """Two panels: time over the floor, ours and peft's; and how many times faster, or less, than peft."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "inlay"  # the same file for the same figures
    import matplotlib.pyplot as plt

    over, faster = collect()
    heights = [max(1, len(over)), max(1, len(faster))]
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 1.6 + 0.28 * sum(heights)), height_ratios=heights, constrained_layout=True
    )
    for place, (_, ours, peft, _) in enumerate(over):
        above.plot(ours.value, place, "o", color=OURS)
        if peft:
            above.plot([ours.value, peft.value], [place, place], "-", color="#bbbbbb", zorder=0)
            above.plot(peft.value, place, "s", color=THEIRS)
    for place, (_, times, _) in enumerate(faster):
        below.barh(place, times.value, color=OURS, height=0.6)
    above.set_title("time over the floor (bar: gate; less is better)")
    below.set_title("times faster, or less, than peft (bar: gate; more is better)")
    for axes, entries in ((above, over), (below, faster)):
        for place, (*_, target) in enumerate(entries):
            if target and target.gate is not None:
                axes.plot(target.gate, place, "|", color="black", markersize=11)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}x" if value < 3 else "")
        axes.axvline(1, color="#dddddd", zorder=0)
        axes.set_yticks(range(len(entries)), [entry[0] for entry in entries], fontsize=8)
        axes.tick_params(axis="x", which="both", labelsize=8)
        axes.invert_yaxis()
    if over:
        above.legend(handles=legend(), loc="lower right", fontsize=8)
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def collect() -> tuple[list[tuple[str, Figure, Figure | None, Target | None]], list[tuple[str, Figure, Target | None]]]:
    """(name, ours, peft's, target) of the rows over a floor; (name, times, target) of those that compare with peft."""
    over, faster = [], []
    for name in catalogue.scripts():
        result = catalogue.read_result(name)
        for row in catalogue.rows(name):
            figures = catalogue.figures_of(result, row)
            targets = {target.of: target for target in row.targets}
            floor, peft = figures.get("inlay / floor"), figures.get("peft / inlay")
            if floor:
                over.append((row.name, floor, figures.get("peft / floor"), targets.get("inlay / floor")))
            if peft and (not floor or "peft / inlay" in targets):
                faster.append((row.name, peft, targets.get("peft / inlay")))
    return over, faster


def legend() -> list[Any]:
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], marker="o", linestyle="", color=OURS, label="inlay"),
        Line2D([], [], marker="s", linestyle="", color=THEIRS, label="peft"),
    ]
