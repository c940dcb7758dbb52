"""How a pattern means a path."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from inlay.errors import ConfigError

__all__ = ["layer_index", "matcher", "pattern_key", "pattern_value"]

_LONGEST_EXPRESSION = 10_000


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> re.Pattern[str]:
    if len(expression) > _LONGEST_EXPRESSION:
        raise ConfigError(
            f"an expression of {len(expression)} characters is refused; {_LONGEST_EXPRESSION} are allowed"
        )
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{expression!r} is not a regular expression: {error}") from error


def matcher(patterns: Any) -> Callable[[str], str | None]:
    """Return a function from a path to the pattern that matches it, or None.

    A string is a regular expression that must match the whole path. A collection holds names: equal to the path or
    to a dotted suffix of it, never a bare substring.
    """
    if isinstance(patterns, str):
        expression = _compiled(patterns)
        return lambda path: patterns if expression.fullmatch(path) else None
    names = set(patterns)
    if not any("." in name for name in names):

        def match_last(path: str) -> str | None:
            last = path.rpartition(".")[2]
            return last if last in names else None

        return match_last

    def match(path: str) -> str | None:
        start = 0
        while True:
            if path[start:] in names:
                return path[start:]
            start = path.find(".", start) + 1
            if not start:
                return None

    return match


def layer_index(path: str, layers_pattern: Any) -> int | None:
    """Return the number of the block that a path lies in.

    Without ``layers_pattern`` it is the first numbered segment of the path; with it, the number behind that name, the
    first one where blocks are nested.
    """
    segments = path.split(".")
    if not layers_pattern:
        return next((int(s) for s in segments[1:] if s.isdigit()), None)
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern)
    for pattern in patterns:
        found = re.match(rf"(?:.*?\.)?{pattern}\.(\d+)\.", path)
        if found:
            return int(found[1])
    return None


def pattern_key(patterns: Iterable[str], path: str, prefixes: bool) -> str | None:
    """Return the first key of a rank or alpha pattern that means ``path``.

    A key is a whole path, a dotted suffix, an expression that matches either, or (``prefixes``) a whole dotted
    prefix: ``model.layers.1`` means everything below that block and nothing in ``model.layers.10``.
    """
    for key in patterns:
        bare = key.removeprefix("^")
        if _compiled(rf"(?:.*\.)?(?:{key})").fullmatch(path) or _compiled(rf"(?:{key})").fullmatch(path):
            return key
        if prefixes and (path.startswith(bare + ".") or _compiled(rf"(?:{bare})\..*").fullmatch(path)):
            return key
    return None


def pattern_value(patterns: dict[str, Any] | None, path: str, default: Any, prefixes: bool) -> Any:
    """Return the value that a pattern gives for ``path``, or the default."""
    if not patterns:
        return default
    key = pattern_key(patterns, path, prefixes)
    return default if key is None else patterns[key]
