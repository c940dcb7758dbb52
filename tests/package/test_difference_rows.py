"""Every row of ``docs/differences.md`` has a test that stands for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from difference_tests import ROWS

ROOT = Path(__file__).parents[2]


@cache
def rows() -> dict[str, list[str]]:
    """What the first column says, by section."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in (ROOT / "docs" / "differences.md").read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith("| what |"):
            found.setdefault(section, []).append(line[2:].split(" | ")[0])
    return found


@cache
def functions(file: str) -> set[str]:
    (path,) = (ROOT / "tests").rglob(f"{file}.py")
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def named() -> Iterator[tuple[str, str, str]]:
    return ((s, row, test) for s, tests in ROWS.items() for row, test in tests.items() if test is not None)


def test_every_section_is_listed() -> None:
    assert ROWS.keys() == rows().keys()


@pytest.mark.parametrize("section", ROWS)
def test_every_row_is_listed(section: str) -> None:
    """By the longest beginning that is its own."""
    taken = [
        max((key for key in ROWS[section] if row.startswith(key)), key=len, default=None) for row in rows()[section]
    ]
    missing = [row for row, key in zip(rows()[section], taken, strict=True) if key is None]
    assert not missing
    assert sorted(taken) == sorted(ROWS[section])


def test_the_named_tests_are_there() -> None:
    absent = [
        (section, row, test)
        for section, row, test in named()
        if test.partition("::")[2] not in functions(test.partition("::")[0])
    ]
    assert not absent


def test_no_more_rows_come_without_a_test() -> None:
    assert sum(test is None for tests in ROWS.values() for test in tests.values()) <= 6
