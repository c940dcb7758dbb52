"""Run the tests that touch a dependency against its oldest and newest supported versions.

    python tests/versions.py                 every environment below
    python tests/versions.py transformers-4  one of them

Each environment is a folder ``.venv-<name>`` of its own, made when it is missing. torch is installed first and by an
exact version, so that nothing else can choose it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]

# peft is here as the tests' oracle; its newest release still runs on the oldest transformers below.
TOOLS = ("peft==0.21.2", "pytest", "pytest-xdist", "hypothesis", "msgspec", "pyyaml", "matplotlib", "rich", "typer")


@dataclass(frozen=True)
class Environment:
    """One set of versions, and the tests that depend on it."""

    name: str
    torch: str
    requirements: tuple[str, ...]
    tests: tuple[str, ...]


ENVIRONMENTS = (
    Environment(
        "transformers-4",
        "2.13.0",
        ("transformers==4.56.2", "accelerate==1.10.1", *TOOLS),
        ("tests/models", "tests/claims", "tests/checkpoint", "tests/cli"),
    ),
    Environment(
        "transformers-5",
        "2.13.0",
        ("transformers==5.23.0", "accelerate==1.15.0", *TOOLS),
        ("tests/models", "tests/claims", "tests/checkpoint", "tests/cli"),
    ),
    Environment(
        "torch-oldest",
        "2.6.0",
        ("transformers==5.23.0", "accelerate==1.15.0", *TOOLS),
        ("tests/core", "tests/laws", "tests/checkpoint"),
    ),
)


def run(environment: Environment) -> bool:
    """Make the environment if it is missing, run its tests, and say whether they passed."""
    home = ROOT / f".venv-{environment.name}"
    python = home / "bin" / "python"
    if not (home / ".ready").exists():
        venv.create(home, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, f"torch=={environment.torch}"], check=True)
        pinned = f"torch=={environment.torch}"
        subprocess.run([*install, pinned, *environment.requirements, "-e", str(ROOT)], check=True)
        (home / ".ready").touch()
    shown = (
        "import sys, torch, transformers; print(sys.version.split()[0], torch.__version__, transformers.__version__)"
    )
    subprocess.run([python, "-c", shown], check=True)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    tests = [python, "-m", "pytest", "-n", "2", "--dist", "loadfile", *environment.tests]
    return subprocess.run(tests, cwd=ROOT, env=settings).returncode == 0


def main(names: list[str]) -> int:
    known = {environment.name: environment for environment in ENVIRONMENTS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no environment {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = [name for name in names or known if not run(known[name])]
    print(f"failed: {', '.join(failed)}" if failed else "every environment passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
