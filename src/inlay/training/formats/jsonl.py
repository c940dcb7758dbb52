"""JSONL: one JSON object on each line; blank lines are passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from inlay.errors import ConfigError
from inlay.training.formats import Layout, Row


def read(path: Path, layout: Layout) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where}: broken JSON, {error.msg} at column {error.colno}") from None
            if not isinstance(values, dict):
                raise ConfigError(f"{where}: a JSON {type(values).__name__}, expected an object with named fields")
            yield Row(values, where)
