"""A method on some output rows of a layer, which are to it a layer of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from inlay.core.affine import Affine, Delta, Site
from inlay.core.around import Around
from inlay.core.inner import Inner
from inlay.core.method import Method, P
from inlay.core.output_rows import Rows, put_rows, spread, take_rows
from inlay.core.slot import Slot
from inlay.errors import UnsupportedError

__all__ = ["Sliced", "as_seen", "own_method", "own_site", "sliced"]

# What a method says of itself and a slice of it says too, beside what every method around another one does.
_SAID = ("shown", "samples", "own_backward", "couples", "reads_tasks", "adds_penalty", "detaches")


class Sliced(Around):
    """A method on some output rows of a layer; :func:`sliced` makes it.

    What the method has of its own and others look for by whether a class has it is in a subclass; see :class:`_Own`.

    Args:
        method: any method.
        rows: which rows.
    """

    own: ClassVar[tuple[str, ...]] = ()  # which members of _Own the class has

    def __init__(self, method: Method, rows: Rows) -> None:
        super().__init__(method, _SAID)
        self.rows = rows

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        return _blank, (type(self).__name__, self.own), self.__dict__

    def part(self, site: Site) -> Site:
        """Return the slice as a site of its own."""
        return replace(site, out=sum(stop - start for start, stop in self.rows))

    def cut(self, layer: Affine) -> Affine:
        """Return the slice's rows of a map."""
        return Affine(self.take(layer.weight), None if layer.bias is None else self.take(layer.bias))

    def take(self, whole: Tensor) -> Tensor:
        """Return the slice's rows of a tensor (out, ...)."""
        return take_rows(self.rows, whole)

    def replaced(self, layer: Affine, before: Affine, part: Affine) -> Affine:
        """Return a map with other rows for the slice; ``before`` is what :meth:`cut` gave of it."""
        weight = put_rows(self.rows, layer.weight, part.weight)
        if part.bias is before.bias or part.bias is None:
            return Affine(weight, layer.bias)
        bias = part.bias.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
        return Affine(weight, put_rows(self.rows, bias, part.bias))

    # -- what the method says of a layer that has just those rows ----------------------------------------------------

    def alike(self, site: Site) -> Any:
        return self.method.alike(self.part(site))

    def refuse(self, site: Site) -> str | None:
        if not site.plain or self.part(site).out == site.out:
            return "a slice is a part of a linear layer's output features, which this is not"
        if self.method.ties:
            return "its rows are those of tokens, by their number in the whole layer, so a slice has no numbers of them"
        return self.method.refuse(self.part(site))

    def note(self, site: Site) -> str | None:
        return self.method.note(self.part(site))

    def options(self, site: Site) -> dict[str, Any]:
        return self.method.options(self.part(site))

    def conflict(self, site: Site, below: Method) -> str | None:
        return self.method.conflict(self.part(site), own_method(below))

    def slots(self, site: Site) -> dict[str, Slot]:
        return self.method.slots(self.part(site))

    def shared_at(self, site: Site, shared: dict[str, Slot]) -> dict[str, Slot]:
        return self.method.shared_at(self.part(site), shared)

    @property
    def linear(self) -> tuple[str, ...]:
        return self.method.linear

    def resting(self, site: Site, p: P, base: Affine) -> dict[str, Tensor]:
        return self.method.resting(self.part(site), p, self.cut(base))

    # -- how it starts -----------------------------------------------------------------------------------------------

    @property
    def needs_base(self) -> bool:
        return self.method.needs_base

    @property
    def rebases(self) -> bool:
        return self.method.rebases

    @property
    def base_cause(self) -> str:
        return self.method.base_cause

    @property
    def measured(self) -> tuple[str, ...]:
        return self.method.measured

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine | None:
        before = self.cut(layer)
        rebased = self.method.prepare(self.part(site), p, before)
        return None if rebased is None else self.replaced(layer, before, rebased)

    # -- its update --------------------------------------------------------------------------------------------------

    def delta(self, site: Site, p: P) -> Delta:
        return spread(self.rows, site.out, self.method.delta(self.part(site), p))

    def update(self, site: Site, p: P) -> Delta:
        return spread(self.rows, site.out, self.method.update(self.part(site), p))


class _Below(Inner):
    """What a method with a forward pass of its own sees below a slice: a layer that has just those rows.

    Args:
        inner: the whole layer.
        sliced: the method there.
        x: the layer's input; what is below makes its output once, also if the method asks for it.
    """

    __slots__ = ("_output", "_x", "sliced")

    def __init__(self, inner: Inner, sliced: Sliced, x: Tensor) -> None:
        super().__init__(inner.layer, inner.chain, inner.depth, inner.args, inner.kwargs)
        self.sliced = sliced
        self._x = x
        self._output: Tensor | None = None

    def whole(self, x: Tensor) -> Tensor:
        """Return the output of all rows."""
        if x is not self._x:
            return super().__call__(x)
        if self._output is None:
            self._output = super().__call__(x)
        return self._output

    def __call__(self, x: Tensor) -> Tensor:
        return take_rows(self.sliced.rows, self.whole(x), -1)

    @property
    def site(self) -> Site:
        return self.sliced.part(self.layer.site)

    def affine(self) -> Affine:
        return self.sliced.cut(super().affine())

    def base_affine(self) -> Affine:
        return self.sliced.cut(super().base_affine())

    def _fused(self, x: Tensor, p: P, delta: Delta, gain: Tensor | None) -> Tensor | None:
        return None  # which makes the output of all rows


class _Own(Sliced):
    """What a slice has where its method's class has it."""

    def look(self, site: Site, layer: Affine) -> None:
        self.method.look(self.part(site), self.cut(layer))

    def derive(self, site: Site, p: P, layer: Affine) -> None:
        self.method.derive(self.part(site), p, self.cut(layer))

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        below = self.cut(layer)
        part = self.method.rewrite(self.part(site), p, below, below if base is layer else self.cut(base))
        return self.replaced(layer, below, part)

    def delta_weight(self, site: Site, p: P, base: Affine) -> Tensor:
        raise UnsupportedError(f"{type(self).__name__} on a slice of {site.name!r} has no matrix for the whole weight")

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        below = _Below(inner, self, x)
        part = self.method.forward(self.part(site), p, x, below)
        y = below.whole(x)
        return put_rows(self.rows, y, part.to(y.dtype), -1)


@cache
def _class_of(name: str, own: tuple[str, ...]) -> type[Sliced]:
    members: dict[str, Any] = {member: _Own.__dict__[member] for member in own}
    return type(name, (Sliced,), {**members, "own": own, "__module__": __name__})


def _blank(name: str, own: tuple[str, ...]) -> Sliced:
    """Return an instance without state: pickles say what its class is made of, since no module holds it."""
    return object.__new__(_class_of(name, own))


def sliced(method: Method, rows: Rows) -> Sliced:
    """Return a method on some rows of layers."""
    cls = type(method)
    own = [hook for hook in ("look", "derive") if getattr(cls, hook) is not getattr(Method, hook)]
    if not method.additive:
        own += ["rewrite", "delta_weight"]
    if not method.additive or cls.forward is not Method.forward:
        own += ["forward"]
    return _class_of(cls.__name__, tuple(own))(method, rows)


def own_method(method: Method) -> Method:
    """Return the adapter's method that a slice has, or the method itself."""
    return method.method if isinstance(method, Sliced) else method


def own_site(method: Method, site: Site) -> Site:
    """Return a layer's site as the adapter's own method sees it."""
    return method.part(site) if isinstance(method, Sliced) else site


def as_seen(method: Method, site: Site, layer: Affine) -> tuple[Site, Affine]:
    """Return a layer's site and map as the adapter's own method sees them."""
    return (method.part(site), method.cut(layer)) if isinstance(method, Sliced) else (site, layer)
