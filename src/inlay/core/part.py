"""A slice of a fused projection: a method adapts some output rows of a layer as if they were a layer of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.affine import Affine, Delta, Dense, LowRank, Site
from inlay.core.around import Around
from inlay.core.fused_layouts import Rows, bare_name, rows_of, split_name
from inlay.core.kind import kind_of
from inlay.core.method import Method, P
from inlay.core.patterns import matcher
from inlay.core.slot import Slot
from inlay.core.structured import Structured
from inlay.errors import TargetError, UnsupportedError
from inlay.parallel.tensors import is_distributed

if TYPE_CHECKING:
    from inlay.core.inner import Inner
    from inlay.core.targets import Place

__all__ = ["RowsOf", "Sliced", "method_at", "own_method", "part_matcher", "spread_rows"]

# What a method says of all layers together, or learns from whole weights, has no meaning for some rows of one.
_WHOLE = ("survey", "look", "borrows", "derive", "derive_shared", "penalty", "step", "pack", "unpack", "shared_slots")


def spread_rows(rows: Rows, out: int, tensor: Tensor, axis: int = -2) -> Tensor:
    """Put the rows of a tensor where a slice has them, between rows of zeros.

    Args:
        rows: ranges of the whole, in ascending order.
        out: how many rows the whole has.
        tensor: its ``axis`` has the rows of the slice.
    """
    parts: list[Tensor] = []
    own = tensor.split([stop - start for start, stop in rows], axis)

    def gap(size: int) -> None:
        if size:
            shape = list(tensor.shape)
            shape[axis] = size
            parts.append(tensor.new_zeros(shape))

    at = 0
    for (start, stop), part in zip(rows, own, strict=True):
        gap(start - at)
        parts.append(part)
        at = stop
    gap(out - at)
    return torch.cat(parts, axis)


class RowsOf(Structured):
    """A structured update of some rows; the others stay as they are.

    Args:
        part: the update of those rows, unscaled or not.
        rows: which they are.
        out: how many rows the layer has.
    """

    factors = ()

    def __init__(self, part: Structured, rows: Rows, out: int) -> None:
        self.part = part
        self.rows = rows
        self.out = out
        self.scale = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return self.part.dtype

    def to(self, dtype: torch.dtype) -> Structured:
        other = copy.copy(self)
        other.part = self.part.to(dtype)
        return other

    def matrix(self) -> Tensor:
        return spread_rows(self.rows, self.out, self.part.dense())


class Sliced(Around):
    """A method on some output rows of a layer.

    Args:
        method: a method that adds an update.
        rows: which rows.
    """

    def __init__(self, method: Method, rows: Rows) -> None:
        super().__init__(method, ("shown", "samples"))
        self.rows = rows

    def part(self, site: Site) -> Site:
        """Return the slice as a site of its own."""
        return replace(site, out=sum(stop - start for start, stop in self.rows))

    def alike(self, site: Site) -> Any:
        return self.method.alike(self.part(site))

    @property
    def needs_base(self) -> bool:
        return self.method.needs_base

    def refuse(self, site: Site) -> str | None:
        method = self.method
        name = type(method).__name__
        if not site.plain or self.part(site).out == site.out:
            return "a slice is a part of a linear layer's output features, which this is not"
        if not method.additive or not method.mergeable:
            return f"a slice takes a method that adds to the weight, and {name} does more than that"
        if any(getattr(type(method), hook) is not getattr(Method, hook) for hook in _WHOLE):
            return f"{name} has tensors or steps that belong to all of its layers, so it cannot have a part of one"
        if method.rebases or method.measured:
            return f"the start that {name} is set to changes or measures the whole weight; start it without"
        return method.refuse(self.part(site))

    def note(self, site: Site) -> str | None:
        return self.method.note(self.part(site))

    def options(self, site: Site) -> dict[str, Any]:
        return self.method.options(self.part(site))

    def conflict(self, site: Site, below: Method) -> str | None:
        return self.method.conflict(self.part(site), below.method if isinstance(below, Sliced) else below)

    def slots(self, site: Site) -> dict[str, Slot]:
        return self.method.slots(self.part(site))

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine | None:
        own = Affine(self.take(layer.weight), None if layer.bias is None else self.take(layer.bias))
        return self.method.prepare(self.part(site), p, own)

    def take(self, whole: Tensor) -> Tensor:
        """Return the slice's rows of a tensor (out, ...)."""
        return torch.cat([whole[start:stop] for start, stop in self.rows])

    def spread(self, site: Site, delta: Delta) -> Delta:
        """Return an update of the slice as one of the layer."""
        bias = None if delta.bias is None else spread_rows(self.rows, site.out, delta.bias, -1)
        if isinstance(delta, LowRank):
            B = spread_rows(self.rows, site.out, delta.B)
            return LowRank(B, delta.A, bias).scaled(delta.scale)
        if isinstance(delta, Structured) and bias is None:
            return RowsOf(delta, self.rows, site.out)
        return Dense(spread_rows(self.rows, site.out, delta.dense()), None if bias is None else bias * delta.scale)

    def delta(self, site: Site, p: P) -> Delta:
        return self.spread(site, self.method.delta(self.part(site), p))

    def update(self, site: Site, p: P) -> Delta:
        return self.spread(site, self.method.update(self.part(site), p))


class _WithForward(Sliced):
    """A slice for a method that has a forward pass of its own, and so no fused one."""

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        part: Any = _Part(self, site, inner)
        return self.method.forward(self.part(site), p, x, part)


def own_method(method: Method) -> Method:
    """Return the adapter's method that a slice has, or the method itself."""
    return method.method if isinstance(method, Sliced) else method


class _Part:
    """What a method with a forward of its own sees below a slice: updates are those of the slice."""

    def __init__(self, sliced: Sliced, site: Site, inner: Inner) -> None:
        self.sliced = sliced
        self.site = site
        self.inner = inner

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def plus(self, x: Tensor, p: P, delta: Delta) -> Tensor:
        return self.inner.plus(x, p, self.sliced.spread(self.site, delta))

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        return self.inner.apply(x, self.sliced.spread(self.site, delta))


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
        own = type(method).forward is not Method.forward
        held[rows] = _WithForward(method, rows) if own else Sliced(method, rows)
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
