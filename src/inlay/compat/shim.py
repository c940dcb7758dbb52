"""The folder with a package ``peft`` that is Inlay: for ``PYTHONPATH``, which child processes inherit."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from inlay.compat.version import check_version
from inlay.config import COMPATIBLE_PEFT_VERSION
from inlay.errors import StateError

__all__ = ["path_with_shim", "shim_folder"]


def shim_folder(version: str = COMPATIBLE_PEFT_VERSION) -> Path:
    """Return a folder that holds the stand-in and its metadata.

    Args:
        version: what the metadata say; for another than the usual one, a copy is made in the user's cache.

    Raises:
        ConfigError: ``version`` is no version.
        StateError: this installation of Inlay lacks the folder.
    """
    import inlay

    package = Path(inlay.__file__).parent
    found = next((p for p in (package / "shims" / "peft", package.parents[1] / "shims" / "peft") if p.is_dir()), None)
    if found is None:
        raise StateError(f"the folder shims/peft is missing beside {package}; install Inlay again")
    if version == COMPATIBLE_PEFT_VERSION:
        return found
    return _copied(found, check_version(version))


def _copied(source: Path, version: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "inlay" / "shims" / f"peft-{version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as made:  # whole or not there, also for a process beside this
        folder = Path(made) / target.name
        info = folder / f"peft-{version}.dist-info"
        shutil.copytree(source / "peft", folder / "peft")
        shutil.copytree(source / f"peft-{COMPATIBLE_PEFT_VERSION}.dist-info", info)
        metadata = info / "METADATA"
        words = metadata.read_text(encoding="utf-8").replace(COMPATIBLE_PEFT_VERSION, version)
        metadata.write_text(words, encoding="utf-8")
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():  # another process was not first: it cannot be written
                raise
    return target


def path_with_shim(version: str = COMPATIBLE_PEFT_VERSION) -> str:
    """Return ``PYTHONPATH`` as it is now, with the stand-in in front."""
    folder = str(shim_folder(version))
    rest = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and part != folder]
    return os.pathsep.join([folder, *rest])
