"""The output folder of a run: what is in it, who wrote it, and whether it may be continued.

::

    adapter_config.json, adapter_model.safetensors   the adapter, at the root
    labels.json        names of the classes (classify only)
    README.md          model card
    metrics.jsonl      a line per logging step and evaluation
    loss.png           the same as a picture
    run.yaml           every setting; works as --config
    run.json           what a resumed run has to find unchanged: data, processes; and versions
    checkpoints/       checkpoint-N folders to resume from
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import msgspec

from inlay.errors import CheckpointError, CheckpointMissingError, ConfigError
from inlay.training.settings import MAY_CHANGE_ON_RESUME, RunConfig, build, read_yaml, write_yaml

SETTINGS, RECORD, METRICS, PLOT, CARD, CHECKPOINTS = (
    "run.yaml",
    "run.json",
    "metrics.jsonl",
    "loss.png",
    "README.md",
    "checkpoints",
)
VERSIONS_OF = ("torch", "transformers", "accelerate", "inlay")


def fingerprint(paths: list[str]) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    found = {}
    for name in paths:
        with open(name, "rb") as handle:
            found[name] = (
                hashlib.file_digest(handle, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha(handle)
            )
    return found


def _sha(handle: Any) -> str:
    """``hashlib.file_digest`` for Python 3.10."""
    digest = hashlib.sha256()
    while chunk := handle.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def refuse_used(folder: Path) -> None:
    """Raise unless ``folder`` is free for a new run: not there, or an empty folder.

    Raises:
        ConfigError: it holds files, or is a file.
    """
    if folder.is_file():
        raise ConfigError(f"output: {str(folder)!r} is a file, expected a folder")
    if folder.is_dir() and any(folder.iterdir()):
        advice = "continue it with --resume or " if (folder / SETTINGS).is_file() else ""
        raise ConfigError(f"output: {str(folder)!r} is not empty; {advice}give another --output")


def stored_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in ``folder``.

    Raises:
        CheckpointMissingError: there is no run there.
    """
    path = folder / SETTINGS
    if not path.is_file():
        raise CheckpointMissingError(
            f"--resume: {str(folder)!r} holds no run (no {SETTINGS}); start it without --resume"
        )
    return read_yaml(path)


def refuse_changed(folder: Path, config: RunConfig, record: dict[str, Any]) -> None:
    """Raise unless the run in ``folder`` had the same settings, data and number of processes.

    Raises:
        ConfigError: the first difference, named, with both values.
        CheckpointError: the record is damaged.
    """
    before = msgspec.to_builtins(build(stored_settings(folder), str(folder / SETTINGS)))
    for name, value in msgspec.to_builtins(config).items():
        if name not in MAY_CHANGE_ON_RESUME and before[name] != value:
            raise ConfigError(
                f"--resume: {name} was {before[name]!r} and is now {value!r}; an exact resume changes nothing"
            )
    try:
        old = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        data, processes = old["data"], old["processes"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder / RECORD} is missing or damaged; the run cannot be continued exactly") from None
    for name, digest in record["data"].items():
        if data.get(name) != digest:
            raise ConfigError(f"--resume: the data file {name!r} has changed since the run began")
    if processes != record["processes"]:
        raise ConfigError(f"--resume: the run had {processes} processes, now {record['processes']}")


def make_record(config: RunConfig, processes: int) -> dict[str, Any]:
    """Return what ``run.json`` holds."""
    versions = {}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            versions[name] = "unknown"
    return {"data": fingerprint([*config.data, *config.eval_data]), "processes": processes, "versions": versions}


def begin(folder: Path, config: RunConfig, record: dict[str, Any]) -> None:
    """Create the folder with settings and record in it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, record)
    write_yaml(config, folder / SETTINGS)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` so that the file is there whole or not at all."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(fresh, path)
