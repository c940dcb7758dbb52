"""The fixtures, unpacked where a test can read them."""

from __future__ import annotations

import json
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from .cases import CASES

__all__ = ["RELEASES", "answers", "folder", "made", "root", "saved_by"]

HERE = Path(__file__).parent
MADE: dict[str, dict[str, str]] = json.loads((HERE / "made.json").read_text())
RELEASES = list(MADE)
_unpacked = tempfile.TemporaryDirectory(prefix="peft-releases-")


@cache
def root(release: str) -> Path:
    """Return the folder of one release."""
    place = Path(_unpacked.name, release)
    with tarfile.open(HERE / f"{release}.tar.xz") as file:
        file.extractall(place, filter="data")
    return place


def saved_by(release: str) -> list[str]:
    """Return the cases that a release wrote."""
    return [name for name, what in MADE[release].items() if what.startswith("made")]


def made(release: str, case: str) -> str:
    """Return how it went."""
    return MADE[release][case]


def folder(release: str, case: str) -> Path:
    """Return where the first adapter of a case lies."""
    first = CASES[case].names[0]
    return root(release) / case / ("" if first == "default" else first)


@cache
def answers(release: str) -> dict[str, Tensor]:
    """Return what the models answered when they were saved, by case.

    Further ones: ``<case>/<adapter>`` of its other adapters, ``<case>/reread`` of the model that the release itself
    makes of the folder, where that is another one.
    """
    return load_file(root(release) / "outputs.safetensors")
