"""Targets that mean a slice of a fused projection: ``qkv_proj[q,v]``, some output rows of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from inlay.core.fused_layouts import bare_name, rows_of, split_name
from inlay.core.kind import kind_of
from inlay.core.method import Method
from inlay.core.output_rows import Rows
from inlay.core.patterns import matcher
from inlay.core.sliced import Sliced, sliced
from inlay.errors import TargetError, UnsupportedError
from inlay.parallel.tensors import is_distributed

if TYPE_CHECKING:
    from inlay.core.targets import Place

__all__ = ["method_at", "part_matcher"]


def method_at(model: Any, place: Place, pattern: str, method: Method) -> Method:
    """Return the method for a place that a pattern chose: on some of its rows, where the pattern names a slice.

    Raises:
        TargetError: the slice is none of that layer.
        UnsupportedError: the layer is spread over processes.
    """
    if split_name(pattern) is None or isinstance(getattr(method.config, "target_modules", None), str):
        return method
    kind = kind_of(place.base)
    if kind is None or kind.name != "linear":
        raise UnsupportedError(
            f"{pattern!r}: {place.path!r} is a {type(place.base).__name__}, and only linear layers have slices"
        )
    if is_distributed(place.base.weight):
        raise UnsupportedError(f"{pattern!r}: the rows of {place.path!r} are spread over processes; target all of it")
    rows = rows_of(model, place.path, kind.site(place.path, place.base).out, pattern)
    held: dict[Rows, Sliced] = method.__dict__.setdefault("slices", {})  # one object for all layers alike
    if rows not in held:
        held[rows] = sliced(method, rows)
    return held[rows]


def part_matcher(targets: Any) -> Callable[[str], str | None]:
    """Return what :func:`inlay.core.patterns.matcher` does, for targets of which some may name a slice of a layer.

    Raises:
        TargetError: two targets name the same layers.
    """
    if isinstance(targets, str) or not any(map(split_name, targets)):
        return matcher(targets)
    named: dict[str, str] = {}
    for target in targets:
        name = bare_name(target)
        if name in named:
            raise TargetError(
                f"target_modules: {named[name]!r} and {target!r} name the same layers; put the parts into one, such as "
                f"{name}[q,v]"
            )
        named[name] = target
    match = matcher(named)

    def match_part(path: str) -> str | None:
        found = match(path)
        return None if found is None else named[found]

    return match_part
