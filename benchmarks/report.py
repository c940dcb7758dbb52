"""docs/performance.md and its plot, from the saved results and from what the scripts say about their rows."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import catalogue, learning, plot
from benchmarks.harness import Figure, Row
from benchmarks.table import HEADINGS, lines, number, spread

DOCUMENT = catalogue.FOLDER.parent / "docs" / "performance.md"
PLOT = DOCUMENT.with_suffix(".svg")
LEARNING = DOCUMENT.with_name("learning.md")

INTRODUCTION = """\
# Performance

<!-- Written by `python -m benchmarks report` from benchmarks/results; do not edit. -->

What an adapter costs, beside the least that it can cost and beside peft. To measure it again:

```sh
python -m benchmarks all --against peft --save   # about a quarter of an hour, on an idle machine
python -m benchmarks report                      # this page and its plot
```

![Time over the floor, and times faster than peft](performance.svg)

## How it was measured

{machine}

- Times are CPU time of the process (`time.process_time`), with one thread. The variants of a row run in turn in one
  process, after one round that warms up; the garbage collector runs before each and is off while the clock runs. A
  figure is the median over the rounds of the ratio within a round; the spread is the least and the largest ratio.
  Ratios can be compared between machines with care, seconds cannot.
- **floor** is what any library of adapters has to do; each section says what that is for its rows.
- **peft** is its figure where ours is "measured": for a ratio over the floor, peft's ratio over the same floor.
- A **gate** is what must hold, a **goal** what is reached for. The verdict is the better of the two that was met.
- Bytes kept for backward are those of the storages that autograd saves, each once, without parameters and buffers.
- Errors are relative, in the Frobenius norm, against the same step in fp64 computed from the definition of the method.
"""


def performance() -> str:
    """The text of docs/performance.md."""
    results = {name: catalogue.read_result(name) for name in catalogue.scripts()}
    parts = [INTRODUCTION.format(machine=machine(results)), "## All rows\n", *overview(results)]
    for name, result in results.items():
        parts += section(name, result)
    return "\n".join(parts).rstrip("\n") + "\n"


def machine(results: Mapping[str, dict[str, Any]]) -> str:
    """One sentence for each set of circumstances, with the scripts that were run in it where there are several."""
    found: dict[str, list[str]] = {}
    for name, result in results.items():
        if result:
            found.setdefault(circumstances(result), []).append(name)
    if len(found) < 2:
        return next(iter(found), "Nothing has been measured yet.")
    return "\n".join(f"- {', '.join(f'`{name}`' for name in names)}: {what}" for what, names in found.items())


def circumstances(result: dict[str, Any]) -> str:
    where = result["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in ("torch", "peft", "transformers", "inlay") if where[name])
    quick = " Measured with `--quick`: smaller models, fewer rounds." if result["quick"] else ""
    return (
        f"{where['processor']} ({where['instructions']}), {where['cores']} cores, {where['threads']} thread; "
        f"{where['system']}, Python {where['python']}, {versions}; commit {where['commit']}, {where['date']}.{quick}"
    )


def overview(results: Mapping[str, dict[str, Any]]) -> list[str]:
    cells = []
    for name, result in results.items():
        for row in catalogue.rows(name):
            failed = result.get("rows", {}).get(row.name, {}).get("failed")
            cells += lines(row, catalogue.figures_of(result, row), failed and "failed")
    return [markdown(HEADINGS, cells), ""]


def section(name: str, result: dict[str, Any]) -> list[str]:
    """The rows of a script with every figure that they measured, and why a goal is missed."""
    title, _, more = (importlib.import_module(f"benchmarks.{name}").__doc__ or name).strip().partition("\n")
    parts = [f"## {title.rstrip('.')}\n", f"`python -m benchmarks.{name} --against peft`\n"]
    if more.strip():
        parts.append(more.strip() + "\n")
    said = ""
    for row in catalogue.rows(name):
        figures = catalogue.figures_of(result, row)
        parts.append(f"### {row.name}\n")
        what = sentence(row.what) + (f" The floor: {sentence(row.floor, raised=False)}" if row.floor else "")
        if what != said:
            parts.append(f"{what}\n")
            said = what
        if figures:
            cells = [(key, number(figure.value, figure.unit), spread(figure)) for key, figure in figures.items()]
            parts.append(markdown(("figure", "median", "spread"), cells) + "\n")
        parts += [f"{text}\n" for text in missed(row, figures)]
    return parts


def missed(row: Row, figures: Mapping[str, Figure]) -> Iterable[str]:
    """One paragraph for each goal (or gate, where there is no goal) that was measured and missed."""
    for target in row.targets:
        figure = figures.get(target.of)
        if figure is None or target.verdict(figure.value) in ("goal", ""):
            continue
        wanted = target.gate if target.goal is None else target.goal
        if target.met(wanted, figure.value):
            continue
        what = "gate" if target.goal is None or not target.met(target.gate, figure.value) else "goal"
        reason = sentence(target.reason) if target.reason else "No reason is given."
        yield f"*{target.of}* misses the {what} with {number(figure.value, figure.unit)}. {reason}"


def sentence(text: str, raised: bool = True) -> str:
    text = text.rstrip(".")
    return (text[:1].upper() + text[1:] if raised else text) + "."


def markdown(headings: Sequence[str], entries: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(headings), "|" + "---|" * len(headings), *map(line, entries)])


def write() -> None:
    DOCUMENT.write_text(performance(), encoding="utf-8")
    plot.draw(PLOT)
    learned = catalogue.read_result(learning.NAME)
    if learned:
        LEARNING.write_text(learning.document(learned), encoding="utf-8")
    for name in catalogue.scripts():
        result = catalogue.read_result(name)
        for row in catalogue.rows(name):
            if row.name not in result.get("rows", {}):
                print(f"{name}: not measured: {row.name}", file=sys.stderr)
            for text in missed(row, catalogue.figures_of(result, row)):
                print(f"{name}: {row.name}: {text}", file=sys.stderr)
