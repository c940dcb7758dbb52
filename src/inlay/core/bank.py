"""The fixed places of one layer; see ``core.fixed``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.affine import LowRank
from inlay.core.bare import Names, bare
from inlay.core.entry import Entry, find_tensor
from inlay.core.hanging import container, hang
from inlay.core.method import Method
from inlay.core.sliced import own_method
from inlay.core.slot import Slot

if TYPE_CHECKING:
    from inlay.core.layer import AdaptedLayer

__all__ = ["Bank", "unfit"]


class Bank:
    """The slots of one layer.

    Args:
        layer: the layer.
        like: what an adapter has there: the slots take its form, but for the rank.
        count: how many slots.
        rank: of their tensors.

    Attributes:
        entries: what traced code runs, the lowest first.
    """

    __slots__ = ("_held", "_links", "entries")

    def __init__(self, layer: AdaptedLayer, like: Entry, count: int, rank: int) -> None:
        self._held: list[Entry | None] = [None] * count
        self.entries = tuple(_entry(layer, like, f"slot{i}", rank) for i in range(count))
        self._links = [
            [_Link(role, slot, find_tensor(entry.home, entry.name, *slot.place)) for role, slot in slots.items()]
            for entry, slots in ((entry, like.method.slots(like.site)) for entry in self.entries)
            if entry.home is not None
        ]

    def reason(self, layer: AdaptedLayer, entry: Entry) -> str | None:
        """Return why an adapter cannot take its turn with those that the slots were made for, or None."""
        first = self.entries[0]
        if type(entry.method) is not type(first.method):
            return (
                f"the slots were made for {type(first.method).__name__}, and this is {type(entry.method).__name__}; "
                "compiled code runs one method"
            )
        links = {link.role: link for link in self._links[0]}
        roles = [role for role, _, _ in entry.places]
        if roles != list(links):
            return f"the slots have the tensors {', '.join(links)}, and this adapter has {', '.join(roles)}"
        ours, theirs = _dropout(layer, first), _dropout(layer, entry)
        if ours != theirs:
            return f"the slots were made for a dropout of {ours}, and this adapter has {theirs}"
        for role, containers, leaf in entry.places:
            tensor, slot = find_tensor(layer, entry.name, containers, leaf), links[role].slot_tensor
            if (tensor.dtype, tensor.device) != (slot.dtype, slot.device):
                return f"expected tensors in {slot.dtype} on {slot.device}, found {tensor.dtype} on {tensor.device}"
        return None

    @torch.no_grad()
    def hold(self, layer: AdaptedLayer, wanted: list[Entry | None]) -> None:
        """Let the slots hold these adapters; only what changes is copied."""
        for i, entry in enumerate(wanted):
            if self._held[i] is not entry:
                self._lift(i, empty=entry is None)
        for i, entry in enumerate(wanted):
            if entry is not None and self._held[i] is None:
                for link, (_, containers, leaf) in zip(self._links[i], entry.places, strict=True):
                    link.hold(find_tensor(layer, entry.name, containers, leaf))
                for option, number in self.entries[i].options.items():
                    number.fill_(entry.options[option])
                entry.compiled = self.entries[i].options
                self._held[i] = entry

    @torch.no_grad()
    def renew(self, layer: AdaptedLayer) -> None:
        """Take parameters in again that were replaced, or given other memory."""
        for links, entry in zip(self._links, self._held, strict=True):
            for link, (_, containers, leaf) in zip(links, entry.places, strict=True) if entry is not None else ():
                assert entry is not None
                tensor = find_tensor(layer, entry.name, containers, leaf)
                if not link.holds(tensor):
                    link.hold(tensor)

    @torch.no_grad()
    def release(self, adapter: str | None = None) -> None:
        """Give the tensors of an adapter, or of all, memory of their own."""
        for i, entry in enumerate(self._held):
            if entry is not None and adapter in (None, entry.name):
                self._lift(i)

    def _lift(self, i: int, empty: bool = True) -> None:
        """Give the tensors in one slot memory of their own; ``empty`` fills the slot with zeros."""
        entry = self._held[i]
        if entry is None:
            return
        for link in self._links[i]:
            link.let_go(empty)
        for number in self.entries[i].options.values() if empty else ():
            number.zero_()
        entry.compiled = None
        self._held[i] = None

    def move(self, fn: Any) -> None:
        """Do what ``nn.Module._apply`` does to the layer; nothing may be held."""
        for entry in self.entries:
            assert entry.home is not None
            entry.home._apply(fn)
            for option, number in entry.options.items():
                device = fn(number).device
                if device.type != "meta":
                    entry.options[option] = number.to(device)


class _Link:
    """One tensor of a slot, and the adapter's that lies in it.

    Attributes:
        role: what it is.
        slot_tensor: the tensor of the largest rank.
        target: the adapter's, a view of the part that it fills.
    """

    __slots__ = ("axis", "role", "slot_tensor", "target")

    def __init__(self, role: str, slot: Slot, tensor: Tensor) -> None:
        self.role = role
        self.axis = slot.dims.index("r") if "r" in slot.dims else None
        self.slot_tensor = tensor
        self.target: Tensor | None = None
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
            tensor.register_post_accumulate_grad_hook(self._pass_on)

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        return whole if self.axis is None else whole.narrow(self.axis, 0, like.shape[self.axis])

    def hold(self, tensor: Tensor) -> None:
        """Copy a tensor in, and make it a view of where it lies then."""
        if tensor.shape != self.slot_tensor.shape:
            self.slot_tensor.zero_()
        part = self._part(self.slot_tensor, tensor)
        part.copy_(tensor)
        tensor.data = part.detach()
        self.target = tensor

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor lies here."""
        return tensor is self.target and tensor.data_ptr() == self.slot_tensor.data_ptr()

    def let_go(self, empty: bool) -> None:
        """Give the adapter's tensor memory of its own."""
        if self.target is not None:
            self.target.data = self.target.detach().clone(memory_format=torch.contiguous_format)
        self.target = None
        if empty:
            self.slot_tensor.zero_()

    def _pass_on(self, slot_tensor: Tensor) -> None:
        """Give the gradient of a slot's tensor to the adapter's parameter."""
        grad, target = slot_tensor.grad, self.target
        slot_tensor.grad = None
        if grad is None or target is None or not target.requires_grad:
            return
        part = self._part(grad, target)
        if target.grad is None:
            target.grad = part
        elif part.requires_grad:
            target.grad = target.grad + part
        else:
            target.grad.add_(part)
        for hook in (getattr(target, "_post_accumulate_grad_hooks", None) or {}).values():
            hook(target)


class _Dropout(nn.Module):
    """Dropout that follows the mode of its layer, below which it does not hang."""

    layer: nn.Module

    def __init__(self, p: float, layer: nn.Module) -> None:
        super().__init__()
        self.p = p
        self.__dict__["layer"] = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(x, self.p, self.layer.training)


def _entry(layer: AdaptedLayer, like: Entry, name: str, rank: int) -> Entry:
    """Make one slot at a layer: its tensors are zeros, the rank axis outermost in memory."""
    slots = like.method.slots(like.site)
    options: dict[str, Any] = {}
    if "scaling" in like.options:
        first = find_tensor(layer, like.name, *next(iter(slots.values())).place)
        precise = torch.float64 if first.dtype == torch.float64 else torch.float32
        options["scaling"] = torch.zeros((), dtype=precise, device=first.device)
    entry = copy.copy(like)
    entry.name, entry.method, entry.options = name, copy.copy(like.method), options
    entry.home, entry.room, entry.compiled = bare(nn.Module), {}, None
    for _, containers, leaf, slot in _places(like, slots):
        held = find_tensor(layer, like.name, containers, leaf)
        shape = [rank if dim == "r" else size for size, dim in zip(held.shape, slot.dims, strict=True)]
        axis = slot.dims.index("r") if "r" in slot.dims else 0
        whole = held.new_zeros([shape[axis], *shape[:axis], *shape[axis + 1 :]]).movedim(0, axis)
        hang(entry.home, name, slot, whole, _bare_module)
    p = _dropout(layer, like)
    if p and like.method.dropout_field is not None:
        holder = container(entry.home, (like.method.dropout_field,), Names)
        holder._modules[name] = _Dropout(p, layer)
    return entry


def _bare_module() -> nn.Module:
    return bare(nn.Module)


def _places(entry: Entry, slots: dict[str, Slot]) -> Iterator[tuple[str, tuple[str, ...], str, Slot]]:
    for role, containers, leaf in entry.places:
        yield role, containers, leaf, slots[role]


def _dropout(layer: AdaptedLayer, entry: Entry) -> float | None:
    """Return the probability of an entry's dropout; None if it is of a kind that is not known."""
    home: Any = layer if entry.home is None else entry.home
    held = None if entry.method.dropout_field is None else home._modules.get(entry.method.dropout_field)
    module = None if held is None else held._modules.get(entry.name)
    if module is None or isinstance(module, nn.Identity):
        return 0.0
    return float(module.p) if type(module) in (nn.Dropout, _Dropout) else None


def unfit(layer: AdaptedLayer, entry: Entry, rank: int) -> str | None:
    """Return why an adapter can be in no slot of this rank, or None."""
    method, site = entry.method, entry.site
    name = type(method).__name__
    if not method.additive or type(method).forward is not Method.forward or entry.shared:
        return f"prepare_for_compile is for low-rank updates, and {name} is something else"
    if own_method(method) is not method:
        return "it adapts a slice of the layer, and slots have the size of all of it"
    if method.skip_probability > 0.0:
        return f"{name} leaves updates out at random, which compiled code has no slot for"
    if entry.home is not None:
        return "it uses the tensors of a layer that it is tied to"
    if not layer.kind.activation or site.experts or site.groups > 1:
        return "parameters, expert banks and grouped convolutions have no slots, because ranks there cannot be padded"
    slots = method.slots(site)
    for _, containers, leaf, slot in _places(entry, slots):
        tensor = find_tensor(layer, entry.name, containers, leaf)
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{slot.key!r} is a {type(tensor).__name__}; tensors that are spread over processes have no slots"
        if tensor.is_meta:
            return f"{slot.key!r} is on the meta device; load it first"
        have = tensor.shape[slot.dims.index("r")] if "r" in slot.dims else 0
        if have > rank:
            return f"{slot.key!r} has rank {have}, and the slots have room for {rank}"
    if any(option != "scaling" and option not in method.unread for option in entry.options):
        return f"{name} reads other numbers than its scale, which would be compiled in"
    with torch.no_grad():
        if type(method.delta(site, layer.params(entry))) is not LowRank:
            return f"prepare_for_compile is for low-rank updates, and {name} is something else"
    return f"its dropout is a {name}'s own" if _dropout(layer, entry) is None else None
