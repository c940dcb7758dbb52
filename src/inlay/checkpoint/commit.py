"""Several files that take their places together: a save that fails leaves the old ones."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from types import TracebackType

from inlay.checkpoint.files import REPLACED

__all__ = ["Commit"]


class Commit:
    """Files are written beside their places and moved there when all are complete, in the order they were staged.

    ::

        with Commit() as commit:
            write_to(commit.stage(path))
            commit.stage_text(other, "...")

    An exception inside the block, or while files are moved, leaves every old file as it was. A process that is killed
    while files are moved leaves the old versions behind under names that end in ``.replaced``; readers refuse the
    folder then, because its files may not belong together, and the next save cleans up.
    """

    def __init__(self) -> None:
        self._token = secrets.token_hex(6)
        self._files: list[tuple[Path | None, Path]] = []
        self._folders: list[Path] = []

    def stage(self, path: Path) -> Path:
        """Return where to write the new version of ``path``; folders are made as needed."""
        missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._folders += missing
        temporary = path.with_name(f".{path.name}.{self._token}.tmp")
        self._files.append((temporary, path))
        return temporary

    def stage_text(self, path: Path, text: str) -> None:
        """Stage a text file."""
        self.stage(path).write_text(text, encoding="utf-8")

    def stage_removal(self, path: Path) -> None:
        """Stage the removal of a file, if it is there."""
        if path.exists():
            self._files.append((None, path))

    def __enter__(self) -> Commit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._move()
        finally:
            for temporary, _ in self._files:
                if temporary is not None:
                    temporary.unlink(missing_ok=True)
            if kind is not None:
                self._drop_folders()

    def _move(self) -> None:
        for temporary, _ in self._files:
            if temporary is not None:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
        kept: dict[Path, Path] = {}
        moved: list[Path] = []
        try:
            for _, path in self._files:
                if path.exists():
                    kept[path] = path.with_name(f".{path.name}.{self._token}{REPLACED}")
                    _second_name(path, kept[path])
            for temporary, path in self._files:
                if temporary is None:
                    path.unlink()
                else:
                    os.replace(temporary, path)
                moved.append(path)
        except BaseException:
            for path in reversed(moved):
                if path in kept:
                    os.replace(kept.pop(path), path)
                else:
                    path.unlink()
            for old in kept.values():
                old.unlink(missing_ok=True)
            self._drop_folders()
            raise
        for _, path in self._files:  # also what earlier saves that were cut off left behind
            for pattern in (f".{path.name}.*{REPLACED}", f".{path.name}.*.tmp"):
                for old in path.parent.glob(pattern):
                    old.unlink(missing_ok=True)

    def _drop_folders(self) -> None:
        for temporary, _ in self._files:
            if temporary is not None:
                temporary.unlink(missing_ok=True)
        for folder in sorted(set(self._folders), key=lambda path: len(path.parts), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _second_name(path: Path, other: Path) -> None:
    """Give a file a second name; a copy where the file system has no links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copy2(path, other)
