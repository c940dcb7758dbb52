"""Layers that read the same tensor (q, k and v; gate and up) go down to their ranks in one product.

Which layers do is seen while they run, not read from a model's names: a layer that gets the very tensor that another
one got just before is remembered as its companion, and from the next forward on the first of them makes the product
for all. A companion that did not come for its part is forgotten again. The mask of an adapter's dropout is theirs in
common from the first forward on, so that what is drawn does not depend on what was seen.

A gradient checkpoint counts what its block saves, so no product is shared where one may be at work: a block that runs
alone and is recomputed with companions would not match. A mask is shared within one block.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.affine import LowRank
from inlay.core.call import call_of, checkpoint_around, may_be_checkpointed
from inlay.kernels.lowrank import shrink
from inlay.kernels.masks import Mask

if TYPE_CHECKING:
    from inlay.core.entry import Entry
    from inlay.core.fused import Updates
    from inlay.core.layer import AdaptedLayer

__all__ = ["Narrow", "narrow"]


class Narrow:
    """A way from an input through ranks to an output.

    Attributes:
        x: the layer's input, (*, in), which goes down to the ranks where their product is not given.
        deltas: the updates, whose products lie side by side.
        dtype: of the products.
        mask: which elements of the input are kept.
        factors: the B of the updates, (out, r).
        scales: their scales.
    """

    __slots__ = ("_t", "deltas", "dtype", "factors", "mask", "scales", "x")
    scales: list[float]

    def __init__(
        self,
        x: Tensor,
        deltas: Sequence[LowRank],
        dtype: torch.dtype,
        mask: Mask | None = None,
        t: Tensor | None = None,
    ) -> None:
        factor = 1.0 if mask is None else mask.scale
        self.x = x
        self.deltas = deltas
        self.dtype = dtype
        self.mask = mask
        self.factors = [delta.B for delta in deltas]
        self.scales = [factor if isinstance(delta.scale, Tensor) else delta.scale * factor for delta in deltas]
        self._t = t

    def one_step(self, dtype: torch.dtype) -> bool:
        """Whether the product is still to be made, and can be one step with the base product, which runs in ``dtype``.

        Compiled code keeps scales in tensors, which no product takes; frozen factors keep no input for backward.
        """
        if self._t is not None or self.dtype != dtype or any(isinstance(delta.scale, Tensor) for delta in self.deltas):
            return False
        return any(delta.A.requires_grad for delta in self.deltas)

    def product(self) -> Tensor:
        """Return t = drop(x) A^T of the updates, (*, sum of ranks), side by side."""
        t = self._t
        if t is None:
            (t,) = shrink(self.x, [[delta.A for delta in self.deltas]], self.dtype, self.mask)
        if any(isinstance(delta.scale, Tensor) for delta in self.deltas):
            columns = [
                delta.scale.to(t.dtype).expand(delta.A.shape[0])
                if isinstance(delta.scale, Tensor)
                else t.new_ones(delta.A.shape[0])
                for delta in self.deltas
            ]
            t = t * (columns[0] if len(columns) == 1 else torch.cat(columns))
        return t


class _Made:
    """A product made for a layer before its turn. It serves if the factors are then still what they were."""

    __slots__ = ("entries", "marks", "t")

    def __init__(self, entries: tuple[Entry, ...], updates: Updates, t: Tensor) -> None:
        self.entries = entries
        self.marks = _marks(updates)
        self.t = t

    def serves(self, entries: tuple[Entry, ...], updates: Updates) -> bool:
        if self.entries != entries or len(self.marks) != len(updates.deltas):
            return False
        return all(
            old[0] is new[0] and old[1:] == new[1:] for old, new in zip(self.marks, _marks(updates), strict=True)
        )


def _marks(updates: Updates) -> list[tuple[Tensor, int, int]]:
    """Return what tells later whether a factor A is another one or was written to."""
    return [(delta.A, delta.A._version, delta.A.data_ptr()) for delta in updates.deltas]


class _Seen(threading.local):
    """The input that a layer got last in this thread, its mask, and the parts made for those expected to get it too."""

    x: Any = None
    key: Any = None
    leader: Any = None
    mask: Mask | None = None
    ready: dict[int, _Made]

    def __init__(self) -> None:
        self.ready = {}


_seen = _Seen()
# layer -> (a layer that gets the same input after it, whose updates it asked for)
Companion = tuple["weakref.ref[Any]", tuple["Entry", ...]]
_companions: weakref.WeakKeyDictionary[nn.Module, list[Companion]] = weakref.WeakKeyDictionary()


def narrow(layer: AdaptedLayer, entries: tuple[Entry, ...], updates: Updates, x: Tensor) -> list[Narrow]:
    """Take an input down to the ranks of a layer's updates, together with those of its companions where it has any."""
    p = _one_probability(layer, updates)
    if p is None:
        return _each(updates, x)
    if not p and not _may_join(layer, x):
        return [Narrow(x, updates.deltas, updates.dtype)]
    seen, key = _seen, _key(layer, updates, x, p)
    leader = None if seen.leader is None else seen.leader()
    if leader is not None and leader is not layer and seen.x() is x and seen.key == key:
        made = seen.ready.pop(id(layer), None)
        if made is not None and made.serves(entries, updates):
            return [Narrow(x, updates.deltas, updates.dtype, seen.mask, made.t)]
        if not _may_join(layer, x):
            return [Narrow(x, updates.deltas, updates.dtype, seen.mask)]
        known = [companion for companion in _companions.get(leader, ()) if companion[0]() not in (None, layer)]
        _companions[leader] = [*known, (weakref.ref(layer), entries)]
        return [Narrow(x, updates.deltas, updates.dtype, seen.mask)]
    if seen.ready and leader is not None and leader in _companions:
        _companions[leader] = [c for c in _companions[leader] if id(c[0]()) not in seen.ready]
    seen.ready.clear()
    seen.x, seen.key, seen.leader = weakref.ref(x), key, weakref.ref(layer)
    return [_for_all(layer, updates, x, p, key)]


def _for_all(layer: AdaptedLayer, updates: Updates, x: Tensor, p: float, key: Any) -> Narrow:
    """Make the product of a layer and its companions; theirs is laid ready for them."""
    from inlay.core.fused import updates_of

    group: list[tuple[Any, tuple[Entry, ...], Updates]] = [(layer, (), updates)]
    call = call_of(layer.state)
    chosen = call is not None and (call.disabled or call.names is not None)
    for ref, entries in _companions.get(layer, ()) if _may_join(layer, x) and not chosen else ():
        other = ref()
        if other is None or other.state is not layer.state or not _may_join(other, x):
            continue
        chain = other.chain(call)
        if not all(entry in chain for entry in entries):
            continue
        theirs = updates_of(other, entries, x)
        if theirs is None or not all(type(d.A) is nn.Parameter and not d.A.is_inference() for d in theirs.deltas):
            continue  # a factor that is computed is another tensor each time
        if _key(other, theirs, x, _one_probability(other, theirs)) == key:
            group.append((other, entries, theirs))
    mask = _seen.mask = Mask(x, p) if p else None
    if len(group) == 1:
        return Narrow(x, updates.deltas, updates.dtype, mask)
    ts = shrink(x, [[delta.A for delta in one.deltas] for _, _, one in group], updates.dtype, mask)
    for (other, entries, theirs), t in zip(group[1:], ts[1:], strict=True):
        _seen.ready[id(other)] = _Made(entries, theirs, t)
    return Narrow(x, updates.deltas, updates.dtype, mask, ts[0])


def _each(updates: Updates, x: Tensor) -> list[Narrow]:
    """Give every update its own dropped input, as its own dropout module makes it."""
    parts = []
    for delta, drop in zip(updates.deltas, updates.drops, strict=True):
        (t,) = shrink(x if drop is None else drop(x), [[delta.A]], updates.dtype)
        parts.append(Narrow(x, [delta], updates.dtype, t=t))
    return parts


def _one_probability(layer: AdaptedLayer, updates: Updates) -> float | None:
    """Return the probability with which every update drops its input, so that one mask serves; None if they differ, or
    if dropout has to be torch's own."""
    first = updates.drops[0]
    if all(drop is None for drop in updates.drops):
        return 0.0
    if updates.deltas[0].A.device.type not in ("cpu", "cuda", "meta"):
        return None  # not every device draws whole words, or from a generator of its own
    if not layer.state.policy.own_dropout or type(first) is not nn.Dropout or not 0.0 < first.p < 1.0:
        return None
    return first.p if all(type(drop) is nn.Dropout and drop.p == first.p for drop in updates.drops) else None


def _may_join(layer: AdaptedLayer, x: Tensor) -> bool:
    """Whether a layer's product may be made before the layer itself is called, or by it for others."""
    wanted = layer.state.policy.share_inputs
    on = x.device.type != "cpu" if wanted is None else wanted
    if not on or torch.are_deterministic_algorithms_enabled():
        return False
    own = layer.__dict__
    hooked = own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    if hooked or torch._C._current_graph_task_id() != -1:
        return False
    return not may_be_checkpointed(layer.training)


def _key(layer: AdaptedLayer, updates: Updates, x: Tensor, p: float | None) -> tuple[Any, ...]:
    """What companions have in common, besides the input itself."""
    version = x._version if not x.is_inference() else -1
    # a mask that was drawn outside of a checkpointed block would not be there when the block is recomputed
    around = checkpoint_around(layer.training) if p else 0
    return id(layer.state), version, torch.is_grad_enabled(), updates.dtype, p, around
