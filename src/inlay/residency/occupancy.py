"""Which adapter is in which slot, and who has to go when another one is needed."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable

from inlay.errors import StateError
from inlay.residency.slots import Fitted, Slots

__all__ = ["Occupancy"]

_IN_USE = "in use by a forward"


class _Mine(threading.local):
    """Leases of the running thread."""

    def __init__(self) -> None:
        self.leases: Counter[str] = Counter()


class Occupancy:
    """The adapters in a model's slots.

    Whoever calls a method holds the lock of ``changed``.

    Args:
        slots: all of them free.
        changed: is notified when an adapter may have become one that can go.

    Attributes:
        at: resident adapter to its slot, the last used at the end.
        pinned: adapters that stay in their slots.
        copies: how often an adapter was copied into a slot so far.
    """

    def __init__(self, slots: Slots, changed: threading.Condition) -> None:
        self._slots = slots
        self._changed = changed
        self._free = list(reversed(slots.names))
        self._leases: Counter[str] = Counter()  # adapter -> forwards that use it
        self._mine = _Mine()
        self._versions: dict[str, int] = {}
        self.at: OrderedDict[str, str] = OrderedDict()
        self.pinned: set[str] = set()
        self.copies = 0

    def lease(self, names: list[str]) -> None:
        """Keep adapters in their slots until they are released as often, for the running thread."""
        self._leases.update(names)
        self._mine.leases.update(names)

    def release(self, names: list[str]) -> None:
        """Undo :meth:`lease`."""
        self._leases.subtract(names)
        self._mine.leases.subtract(names)
        self._changed.notify_all()

    def unpin(self, name: str) -> None:
        """Let an adapter go when its slot is needed."""
        self.pinned.discard(name)
        self._changed.notify_all()

    def admit(self, names: list[str], fitted: Callable[[str], Fitted]) -> dict[str, str]:
        """Make adapters resident and return their slots; everything that can fail comes before the first copy.

        Args:
            names: each once.
            fitted: returns an adapter ready to be copied.

        Raises:
            StateError: no slot can be had, or the slots are no longer in the model.
            what ``fitted`` raises.
        """
        if self._slots.names[0] not in self._slots.state.records:
            raise StateError("the slots were taken out of the model; make another AdapterStore")
        fits: dict[str, Fitted] = {}
        while True:
            missing = [name for name in names if name not in self.at]
            fits.update((name, fitted(name)) for name in missing if name not in fits)
            victims = self._victims(len(missing) - len(self._free), names)
            if victims is not None:
                break
            self._changed.wait()  # others may take or free slots meanwhile
        for victim in victims:
            self.drop(victim)
        for name in missing:
            slot = self._free.pop()
            try:
                self._slots.write(slot, fits[name])
            except BaseException:
                self._free.append(slot)
                raise
            self.copies += 1
            self.at[name] = slot
            self._versions[name] = self._version(slot)
        for name in names:
            self.at.move_to_end(name)
        return {name: self.at[name] for name in names}

    def _victims(self, count: int, wanted: list[str]) -> list[str] | None:
        """Return the least recently used adapters that can go; None to wait for what other threads use.

        Raises:
            StateError: waiting is of no use.
        """
        if count <= 0:
            return []
        found: list[str] = []
        reasons: dict[str, str] = {}
        for name in self.at:
            reason = "asked for as well" if name in wanted else self._kept(name)
            if reason is None:
                found.append(name)
                if len(found) == count:
                    return found
            else:
                reasons[name] = reason
        waits = [name for name, reason in reasons.items() if reason == _IN_USE and not self._mine.leases[name]]
        if len(found) + len(waits) >= count and not +self._mine.leases:  # two that wait for each other wait for ever
            return None
        kept = ", ".join(f"{name!r} ({reason})" for name, reason in reasons.items()) or "none"
        raise StateError(
            f"{len(wanted)} adapters are asked for, and {count} more of the {len(self._slots.names)} slots would be "
            f"needed than are free; what cannot be evicted: {kept}"
        )

    def _kept(self, name: str) -> str | None:
        """Return why a resident adapter cannot go, or None."""
        slot, state = self.at[name], self._slots.state
        if name in self.pinned:
            return "pinned"
        if slot in state.active:
            return "active"
        if self._leases[name] > 0:
            return _IN_USE
        if any(slot in layer.merged_names for layer in state.layers()):
            return "merged"
        if slot in state.training and any(tensor.requires_grad for tensor in self._slots.tensors(slot)):
            return "trainable"
        return "changed since it was copied in" if self._version(slot) != self._versions[name] else None

    def _version(self, slot: str) -> int:
        return sum(tensor._version for tensor in self._slots.tensors(slot))

    def drop(self, name: str, changed: bool = False) -> None:
        """Free the slot of a resident adapter.

        Args:
            changed: also where it was changed since it was copied in.

        Raises:
            StateError: it cannot go.
        """
        reason = self._kept(name)
        if reason is not None and not (changed and reason.startswith("changed")):
            raise StateError(f"adapter {name!r} cannot leave its slot: it is {reason}")
        self._free.append(self.at.pop(name))
        self._versions.pop(name, None)
