"""The scripts in the order of the table, the rows of each, and where their results are kept."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, Row

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
SCRIPTS = (
    "importing",
    "injecting",
    "loading",
    "switching",
    "residency",
    "training_step",
    "kept_bytes",
    "dora_step",
    "compiled_step",
    "experts",
    "merging",
    "decoding",
    "mixed_batch",
)


def scripts() -> list[str]:
    return [name for name in SCRIPTS if (FOLDER / f"{name}.py").is_file()]


def rows(script: str) -> list[Row]:
    """The rows of a script in the order in which it defines them."""
    module = importlib.import_module(f"benchmarks.{script}")
    return [value for value in vars(module).values() if isinstance(value, Row)]


def result_file(script: str) -> Path:
    return RESULTS / f"{script}.json"


def read_result(script: str) -> dict[str, Any]:
    """The saved result of a script; empty where there is none."""
    path = result_file(script)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def figures_of(result: dict[str, Any], row: Row) -> dict[str, Figure]:
    """The saved figures of a row; empty where it was not measured or failed."""
    entry = result.get("rows", {}).get(row.name, {})
    return {name: Figure(**values) for name, values in entry.get("figures", {}).items()}


def write_result(script: str, result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    fresh = result_file(script).with_suffix(".json.new")
    fresh.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    fresh.replace(result_file(script))
