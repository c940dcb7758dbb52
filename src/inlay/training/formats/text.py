"""Plain text: a file is one document, or one labelled example per line with the file's name as label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from inlay.training.formats import Layout, Row


def read(path: Path, layout: Layout) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8")
    if layout.unit == "document":
        if text.strip():
            yield Row({layout.text_field: text}, str(path))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield Row({layout.text_field: line.strip(), layout.label_field: path.stem}, f"{path}:{number}")
