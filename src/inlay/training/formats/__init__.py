"""Data formats: a table from file suffix to the module that reads it.

A format is a module with ``read(path, layout) -> Iterator[Row]``; formats with rows and names of their own have no
use for the layout. To add a format, write the module and add its suffixes here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from inlay.errors import CheckpointMissingError, ConfigError, did_you_mean

FORMATS = {
    ".jsonl": "inlay.training.formats.jsonl",
    ".txt": "inlay.training.formats.text",
    ".md": "inlay.training.formats.text",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One example as read: its fields, and ``file:line`` for messages."""

    values: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Layout:
    """How files without fields are cut into rows, and what the fields are called."""

    unit: str  # "document" or "line": what one example is for the task
    text_field: str
    label_field: str


def check_files(paths: list[str], setting: str) -> None:
    """Raise unless every path is a file of a known format, without reading any.

    Raises:
        CheckpointMissingError: a file that is not there (a FileNotFoundError as well).
        ConfigError: a suffix no format reads, or a file given twice.
    """
    for position, name in enumerate(paths):
        path = Path(name)
        if not path.is_file():
            beside = [str(path.with_name(p.name)) for p in path.parent.glob("*") if p.is_file()]
            raise CheckpointMissingError(f"{setting}: there is no file {name!r}.{did_you_mean(name, beside)}")
        if path.suffix.lower() not in FORMATS:
            raise ConfigError(f"{setting}: {name!r} has no known format; expected one of {', '.join(FORMATS)}")
        if name in paths[:position]:
            raise ConfigError(f"{setting}: {name!r} is given twice")


def read_rows(paths: list[str], setting: str, layout: Layout) -> Iterator[Row]:
    """Yield the rows of all files in order.

    Raises:
        ConfigError: a broken line, named as ``file:line``, or text that is not UTF-8.
    """
    check_files(paths, setting)
    for name in paths:
        reader = import_module(FORMATS[Path(name).suffix.lower()])
        try:
            yield from reader.read(Path(name), layout)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{setting}: {name} is not UTF-8 text: {error.reason} at byte {error.start}") from None
