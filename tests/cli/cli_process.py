"""The command as a process: its words and its environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src"


def environment() -> dict[str, str]:
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "inlay", *map(str, words)]
