"""Messages: Inlay raises and warns in PEFT's places and with PEFT's types, in words of its own.

A test that looks for PEFT's words passes with Inlay's where ``wording.toml`` says which words those are; it is counted
apart. With ``PEFT_SUITE_WORDS`` (a file), every message is taken and what was said is written there, to be judged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import tomllib

_ENTRIES = tomllib.loads((Path(__file__).parent / "wording.toml").read_text(encoding="utf-8")).get("message", [])
_COLLECT = os.environ.get("PEFT_SUITE_WORDS")
_current: list[pytest.Item] = []


def _accept(messages: Iterable[str]) -> bool:
    """Tell whether the running test may hear one of these instead of what it asks for, and note that it did."""
    item = _current[-1]
    name = item.name.partition("[")[0]
    heard = list(messages)
    for entry in _ENTRIES:
        here = any(fnmatchcase(name, pattern) for pattern in entry["tests"])
        if here and any(re.search(entry["says"], message) for message in heard):
            item.user_properties.append(("wording", True))
            return True
    if _COLLECT and heard:
        with open(_COLLECT, "a", encoding="utf-8") as file:
            print(f"{name}\t{heard[-1]!r}", file=file)
        return True
    return False


class _Heard:
    """A block of ``pytest.raises`` or ``pytest.warns`` whose pattern may be met in other words."""

    def __init__(self, block: Any, pattern: Any, messages: Callable[[Any], list[str]]) -> None:
        self._block, self._pattern, self._messages = block, pattern, messages

    def __enter__(self) -> Any:
        self._found = self._block.__enter__()
        return self._found

    def __exit__(self, *raised: Any) -> Any:
        result = self._block.__exit__(*raised)
        if raised[0] is None or result:
            heard = self._messages(self._found)
            if not any(re.search(self._pattern, message) for message in heard) and not _accept(heard):
                raise AssertionError(f"Regex pattern did not match.\n  Expected: {self._pattern!r}\n  Found: {heard!r}")
        return result


def listen() -> None:
    """Let ``pytest.raises`` and ``pytest.warns`` take Inlay's words."""
    raises, warns = pytest.raises, pytest.warns

    def raises_worded(expected: Any = Exception, *args: Any, match: Any = None, **kwargs: Any) -> Any:
        block = raises(expected, *args, **kwargs)
        return block if match is None or args else _Heard(block, match, lambda found: [str(found.value)])

    def warns_worded(expected: Any = Warning, *args: Any, match: Any = None, **kwargs: Any) -> Any:
        block = warns(expected, *args, **kwargs)
        if match is None or args:
            return block
        return _Heard(block, match, lambda found: [str(w.message) for w in found if issubclass(w.category, expected)])

    pytest.raises, pytest.warns = raises_worded, warns_worded


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    """Know which test is running."""
    _current.append(item)
    try:
        return (yield)
    finally:
        _current.pop()
