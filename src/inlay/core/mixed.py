"""A layer under a call that chose adapters by sample: the base product once, and each sample's own update.

Low-rank updates of linear layers run together. Whatever else a layer may have (another kind of layer, a method with a
forward of its own, an input that is no plain tensor) runs one sub-batch for each adapter, through ``Kind.routed``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from inlay.core.affine import LowRank
from inlay.core.call import Call
from inlay.core.factors import factor_paths, hanging
from inlay.core.fused import active_dropout, fused_dtype, input_reason, own_product
from inlay.core.method import Method, P
from inlay.core.mixed_graph import trace_together
from inlay.core.ready_mixed import run_ready
from inlay.core.state import BASE
from inlay.core.tasks import run_apart
from inlay.errors import RoutingError
from inlay.kernels.grouped import Updates, add_updates
from inlay.kernels.stacked import Stack, add_stacked

if TYPE_CHECKING:
    from inlay.core.entry import Entry
    from inlay.core.layer import AdaptedLayer
    from inlay.core.routes import Routes

__all__ = ["run_routed"]

_PLAIN = (Tensor, nn.Parameter)
# A stack of factors is faster than a slice for each adapter up to so many rows of one adapter ...
_FEW_ROWS = 32
# ... and so many seats for each row that needs one.
_WASTE = 1.5


def run_routed(layer: AdaptedLayer, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a layer so that each sample has the adapter that the call chose for it, where the layer has that one.

    Raises:
        RoutingError: adapters are merged into the layer, or it did not get one row per sample.
    """
    assert call.names is not None
    if layer._merged:
        raise RoutingError(
            f"{layer.site.name!r} has adapters merged ({', '.join(layer._merged)}); unmerge them before choosing "
            "adapters by sample"
        )
    present = dict.fromkeys(call.names) if call.routes is None else call.routes.present
    here = tuple([name for name in present if name in layer.entries])
    if not here:
        return layer._run_named(BASE, args, kwargs)
    if layer.state.coupled or call.tasks is not None:
        return run_apart(layer, call, here, args, kwargs)
    if len(here) == len(present) == 1:
        return layer._run_named(here[0], args, kwargs)
    x = args[0] if args else next(iter(kwargs.values()))
    short = call.routes is not None and len(args) == 1 and not kwargs and call.expand == 1
    if short and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y = run_ready(layer, call.routes, x)  # type: ignore[arg-type]
        if y is not None:
            return y
    names = call.names_for(x)
    y = None
    if call.routes is not None:
        routes = call.routes.of(names)
        together = trace_together if torch.compiler.is_compiling() else _run_together
        y = together(layer, routes, here, x, args, kwargs)
    return layer.kind.routed(layer, names, layer._run_named, args, kwargs) if y is None else y


def _run_together(
    layer: AdaptedLayer,
    routes: Routes,
    here: tuple[str, ...],
    x: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Run the updates of the adapters ``here``; None where one of them, or the input, needs the generic way."""
    if not layer.kind.multiplies or input_reason(x) is not None:
        return None
    samples = len(routes.names)
    if x.dim() < 2 or x.shape[0] != samples:
        return None
    found = _updates(layer, here)
    if found is None:
        return None
    A, B, biases, scales, drops = zip(*found, strict=True)
    dtype = x.dtype
    if A[0].dtype is not dtype or torch._C._is_any_autocast_enabled():
        dtype = fused_dtype(layer, [LowRank(B[0], A[0])], x)
    if args:
        args = args[1:]
    else:
        kwargs = dict(kwargs)
        kwargs.pop(next(iter(kwargs)))
    product = None if args or kwargs else own_product(layer, x)
    base: Tensor | tuple[Tensor, Tensor, Tensor | None]
    if product is None:
        output = layer.base_layer(x, *args, **kwargs)
        if type(output) not in _PLAIN or output.shape[:-1] != x.shape[:-1]:
            return None
        base = output
    else:
        weight = product[0]
        base = (x if x.dtype is weight.dtype else x.to(weight.dtype), *product)
    rows = x.shape[1:-1].numel()
    if not any(drops) and not any(bias is not None for bias in biases):
        stack = _stack(layer, routes, here, x, base, rows, A, B, scales, dtype)
        if stack is not None:
            return add_stacked(base, x, stack, routes.seats(here, x.device))
    slices = routes.slices(here, (layer.site.fan_in + layer.site.out) * rows, x.device)
    updates = Updates(A, B, biases, scales, drops, dtype, layer.state.policy.own_dropout)
    return add_updates(base, x, slices, updates)


_Update = tuple[Tensor, Tensor, "Tensor | None", float, float]
# layer -> (version of its state, adapter -> what its update is made of)
_recipes: WeakKeyDictionary[Any, tuple[int, dict[str, _Recipe | None]]] = WeakKeyDictionary()


def _updates(layer: AdaptedLayer, here: tuple[str, ...]) -> list[_Update] | None:
    """Return A, B, bias, scale and dropout of each adapter; None where one is no plain low-rank update."""
    version = layer.state.version
    held = _recipes.get(layer)
    if held is None or held[0] != version:
        held = _recipes[layer] = (version, {})
    recipes, found = held[1], []
    for name in here:
        if name not in recipes:
            recipes[name] = _recipe(layer, name)
        recipe = recipes[name]
        update = None if recipe is None else recipe.read(layer)
        if update is None:
            return None
        found.append(update)
    return found


def _recipe(layer: AdaptedLayer, name: str) -> _Recipe | None:
    chain = layer.entries[name]
    if len(chain) != 1 or layer.why_not_fused(chain) is not None:
        return None
    return _Recipe(layer, chain[0])


class _Recipe:
    """How to come by an update without asking the method, where its factors are the adapter's own tensors."""

    __slots__ = ("drop", "entry", "paths")

    def __init__(self, layer: AdaptedLayer, entry: Entry) -> None:
        method, p = entry.method, layer.params(entry)
        delta = method.delta(entry.site, p)
        self.entry = entry
        self.drop = method.dropout_field
        assert isinstance(delta, LowRank)
        exact = isinstance(delta.scale, float) and delta.scale == 1.0 and type(method).update is Method.update
        self.paths = factor_paths(entry, p, delta) if exact else None  # without them the method is asked

    def read(self, layer: AdaptedLayer) -> _Update | None:
        entry = self.entry
        A = B = bias = None
        if self.paths is not None:
            home = layer if entry.home is None else entry.home
            A, B, bias = [None if path is None else hanging(home, path) for path in self.paths]
        if A is not None and B is not None:
            scale: Any = entry.options.get("scaling", 1.0)
            holder = None if self.drop is None else home._modules.get(self.drop)
            drop: Any = None if holder is None else holder._modules.get(entry.name)
        else:
            p = layer.params(entry)
            delta = entry.method.update(entry.site, p)
            if type(delta) is not LowRank:
                return None
            A, B, bias, scale, drop = delta.A, delta.B, delta.bias, delta.scale, p._dropout
        if type(A) not in _PLAIN or type(B) not in _PLAIN:
            return None
        if type(scale) is not float:
            if isinstance(scale, Tensor):  # compiled code keeps scales in tensors
                B, bias, scale = B * scale, None if bias is None else bias * scale, 1.0
            scale = float(scale)
        if drop is not None and not isinstance(drop, nn.Identity):
            drop = active_dropout(P(drop))
            if drop is not None:
                return (A, B, bias, scale, drop.p) if type(drop) is nn.Dropout and drop.p < 1.0 else None
        return A, B, bias, scale, 0.0


def _stack(
    layer: AdaptedLayer,
    routes: Routes,
    here: tuple[str, ...],
    x: Tensor,
    base: Tensor | tuple[Tensor, Tensor, Tensor | None],
    rows: int,
    A: tuple[Tensor, ...],
    B: tuple[Tensor, ...],
    scales: tuple[float, ...],
    dtype: torch.dtype,
) -> Stack | None:
    """Return the stack of a layer's factors, where one is worth having and allowed."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *_tensors(base), *A, *B)):
        return None
    held = routes.stacks.get(layer)
    if isinstance(held, Stack) and held.holds(A, B, scales, dtype):
        stack = held
    elif held is None and x.device.type == "cpu":  # a forward may stay the only one; launches cost more elsewhere
        routes.stacks[layer] = 1
        return None
    else:
        stack = None
    seats = routes.seats(here, x.device)
    if seats.size * rows > _FEW_ROWS or seats.waste > _WASTE:
        return None
    if stack is None:
        key = Stack.key(A, B, scales)
        if key is None:
            return None
        stack = routes.stacks[layer] = Stack(A, B, scales, dtype, key)
    return stack


def _tensors(base: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    return [base] if isinstance(base, Tensor) else [tensor for tensor in base if tensor is not None]
