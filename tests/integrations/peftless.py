"""Running tests in a process of their own in which ``import peft`` means Inlay and peft is not installed.

A file ``check_*.py`` below this folder holds ordinary tests. The pytest that finds it starts another one for the whole
file, under ``python -m inlay run``, and reports what each test did there. A file that says ``WAY_IN = "PYTHONPATH"``
runs with the folder of ``inlay shim-path`` on its path instead.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
INSIDE = "INLAY_PEFTLESS"  # set in the process that runs the tests themselves
SECONDS = 600


def installed_peft() -> str | None:
    """Return where a real peft is installed, or None; a stand-in on the path does not count."""
    for found in metadata.distributions(name="peft"):
        if (found.read_text("INSTALLER") or "").strip() != "inlay":
            return str(found.locate_file("peft"))
    return None


def reason_to_skip() -> str | None:
    """Return why nothing below this folder can be tested here, or None."""
    where = installed_peft()
    if where is not None:
        return f"peft is installed ({where}); run these with .venv-integrations/bin/python, which has none"
    return None


def peft_python() -> Path | None:
    """Return the Python of the environment that has the real peft, for oracles, or None."""
    found = ROOT / ".venv" / "bin" / "python"
    return found if found.exists() else None


def run_with_peft(script: str, *arguments: str | os.PathLike[str]) -> None:
    """Run a script where the real peft is installed; what it finds out it writes to files.

    Args:
        script: Python source.
        arguments: its ``sys.argv[1:]``.
    """
    python = peft_python()
    assert python is not None, "ask peft_python() first"
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", INSIDE)}
    environment["PYTHONPATH"] = str(HERE)
    done = subprocess.run(
        [str(python), "-c", script, *map(os.fspath, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def child_environment(way: str) -> dict[str, str]:
    """Return the environment of a process that runs tests: offline, one thread, no cache of the user's."""
    environment = dict(os.environ)
    environment |= {
        INSIDE: "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("PYTEST_ADDOPTS", None)
    for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
        del environment[name]
    if way == "PYTHONPATH":
        from inlay.compat.shim import path_with_shim

        environment["PYTHONPATH"] = path_with_shim()
    return environment


@dataclass
class Outcome:
    """What one test did: ``passed``, ``failed`` or ``skipped``, and its words."""

    status: str
    words: str
    seconds: float


def source_of(file: Path) -> tuple[list[tuple[str, int]], str]:
    """Return the names and lines of a file's tests, and its way in, without importing it."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = [(node.name, node.lineno) for node in tree.body if isinstance(node, ast.FunctionDef)]
    way = "run"
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "WAY_IN" for target in node.targets):
            way = str(ast.literal_eval(node.value))
    return [(name, line) for name, line in found if name.startswith("test_")], way


def run_file(file: Path, names: Sequence[str], way: str) -> dict[str, list[Outcome]]:
    """Run tests of a file in one process of their own; returns what each did, one entry for each of its cases."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        start = [sys.executable, *(["-m", "inlay", "run"] if way == "run" else []), "-m", "pytest"]
        done = subprocess.run(
            [
                *start,
                "-q",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                "--tb=short",
                f"--junitxml={report}",
                *(f"{file}::{name}" for name in names),
            ],
            cwd=ROOT,
            env=child_environment(way),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        if not report.exists():
            words = f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            return {name: [Outcome("failed", words, 0.0)] for name in names}
        return _outcomes(ElementTree.parse(report).iter("testcase"), names, done.stdout)


def _outcomes(cases: Iterable[ElementTree.Element], names: Sequence[str], output: str) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {name: [] for name in names}
    for case in cases:
        label = case.get("name", "")
        name = label.partition("[")[0]
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = next((child for child in case if child.tag == "skipped"), None)
        status = "failed" if bad is not None else "skipped" if skipped is not None else "passed"
        said = bad if bad is not None else skipped
        words = "" if said is None else f"{label}: {said.get('message', '')}\n{said.text or ''}"
        found.setdefault(name, []).append(Outcome(status, words, float(case.get("time", 0.0))))
    for name in names:
        if not found[name]:
            found[name] = [Outcome("failed", f"{name} did not run\n{output[-3000:]}", 0.0)]
    return found
