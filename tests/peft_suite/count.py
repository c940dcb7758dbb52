"""What counts, and the page that says how much of it passes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import tomllib

from inlay.core.registry import method_types

FLOOR = 0.95
# Features of needs.FEATURES that Inlay has; what is not named here is not counted.
BUILT_FEATURES: tuple[str, ...] = ()


def needs_built() -> list[str]:
    """Return every method and feature that a counted test may need."""
    return [*method_types(), *BUILT_FEATURES]


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Return test id -> what the plugin wrote of it."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {entry["id"]: entry for entry in map(json.loads, lines)}


def summary(path: Path) -> str:
    """Return a line of counts by outcome."""
    counts = Counter(entry["outcome"] for entry in read_results(path).values())
    return ", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no results"


def share(part: int, whole: int) -> str:
    """Return a fraction in per cent."""
    return f"{part / max(whole, 1):.1%}"


class Known:
    """The tests that ask for what Inlay does differently on purpose.

    Raises:
        ValueError: an entry has no reason.
    """

    def __init__(self, path: Path) -> None:
        self.entries: list[dict[str, Any]] = tomllib.loads(path.read_text(encoding="utf-8")).get("differs", [])
        for entry in self.entries:
            if not entry.get("reason") or not entry.get("tests"):
                raise ValueError(f"{path}: an entry needs tests and a reason: {entry}")
        self.used: Counter[int] = Counter()

    def __call__(self, test: str) -> bool:
        """Tell whether a test is listed, and remember that its entry was needed."""
        path, bracket, parameters = test.partition("[")
        name = path.rpartition("::")[2] + bracket + parameters
        for number, entry in enumerate(self.entries):
            if any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in entry["tests"]):
                self.used[number] += 1
                return True
        return False


@dataclass
class Row:
    """One file: tests that count, and what Inlay made of them.

    Attributes:
        counted: tests that pass with PEFT and need only what is built.
        passed: of these, what passes as it is.
        worded: what passes when Inlay's words are taken for PEFT's (``wording.toml``).
        differs: what asks for something that Inlay does otherwise on purpose (``known.toml``).
        failures: all others.
    """

    counted: int = 0
    passed: int = 0
    worded: int = 0
    differs: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def share(self) -> str:
        return share(self.passed + self.worded, self.counted)


def _unnumbered(test: str) -> str:
    return re.sub(r"(kwargs)\d+", r"\1", test)


def figures(peft: dict[str, Any], inlay: dict[str, Any], known: Known) -> Row:
    """Compare the results of one file."""
    built = set(needs_built())
    row = Row()
    # the numbers in names count what else is in a list, and lists may be made from the classes that are there
    loose: dict[str, list[str]] = {}
    for test in inlay:
        loose.setdefault(_unnumbered(test), []).append(test)
    for test, entry in peft.items():
        if entry["outcome"] != "passed" or not built.issuperset(entry["needs"]):
            continue
        row.counted += 1
        alike = loose.get(_unnumbered(test), [])
        same = test if test in inlay else alike[0] if len(alike) == 1 else ""
        found = inlay.get(same, {"outcome": "missing"})
        outcome = found["outcome"]
        if outcome == "passed" and found.get("wording"):
            row.worded += 1
        elif outcome == "passed":
            row.passed += 1
        elif known(test.removeprefix("tests/")):
            row.differs += 1
        else:
            row.failures.append(f"{outcome} {test}")
    return row


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def page(rows: dict[str, Row], known: Known) -> str:
    """Return the page ``docs/compatibility-suite.md``."""
    counted, passed, worded, differs = (
        sum(getattr(row, name) for row in rows.values()) for name in ("counted", "passed", "worded", "differs")
    )
    failed = counted - passed - worded - differs
    lines = [
        "# PEFT's own tests, with Inlay behind `import peft`",
        "",
        "Written by `make test-peft-suite`. The tests are those of PEFT 0.21.2's source distribution, unchanged. A",
        "test counts when it passes with PEFT itself (offline, on the CPU, with tiny models of random weights in place",
        "of the ones on the hub) and every method that it uses is built in Inlay.",
        "",
        f"**{passed + worded} of {counted} pass: {share(passed + worded, counted)}.** Of these, {passed}",
        f"({share(passed, counted)}) pass as they are, and {worded} when Inlay's words are taken for PEFT's: an error",
        "or a warning of the same type comes in the same place and says the same thing differently",
        f"(`tests/peft_suite/wording.toml`). {differs} ask for what Inlay does differently on purpose (below), and",
        f"{failed} fail.",
        "",
        _line(["file", "counted", "passed", "in other words", "differs", "failed", "pass"]),
        _line(["---", "--:", "--:", "--:", "--:", "--:", "--:"]),
    ]
    for name, row in rows.items():
        if row.counted:
            cells = [row.counted, row.passed, row.worded, row.differs, len(row.failures), row.share]
            lines.append(_line([f"`test_{name}.py`", *cells]))
    lines += [_line(["all", counted, passed, worded, differs, failed, share(passed + worded, counted)])]
    if known.used:
        lines += ["", "## Different on purpose", "", _line(["tests", "example", "why"]), _line(["--:", "---", "---"])]
        for number, entry in enumerate(known.entries):
            if known.used[number]:
                lines.append(_line([known.used[number], f"`{entry['tests'][0]}`", entry["reason"]]))
    if failed:
        lines += ["", "## Failing", ""]
        causes = Counter(failure.split("::")[-1].split("[")[0] for row in rows.values() for failure in row.failures)
        lines += [f"- `{name}` ({number})" for name, number in causes.most_common()]
    return "\n".join(lines) + "\n"
