"""Fixed places for the adapters that are active, so that compiled code has the same tensors whichever they are.

A layer gets a few low-rank updates of one largest rank, which is what traced code runs. An adapter that becomes active
has its values copied into one of them, and its own parameters become views of the part that they fill. So whatever
reads or writes an adapter's parameters (an optimiser, a checkpoint, a merge) reads and writes what compiled code runs;
only gradients, which autograd gives to the whole tensors, are passed on. An adapter that is no longer active gets
memory of its own again. Eager code takes no notice of any of this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from inlay.core.bank import Bank, unfit
from inlay.core.layer import AdaptedLayer
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.core.state import Record, State

__all__ = ["FixedSlots"]


class FixedSlots:
    """What a model was prepared for; see :func:`inlay.prepare_for_compile`.

    Args:
        count: how many adapters may be active at once.
        max_rank: the largest rank of any adapter that is to become active.
    """

    def __init__(self, count: int, max_rank: int) -> None:
        self.count = count
        self.max_rank = max_rank
        self._placed: tuple[Any, ...] | None = None
        self._checked: dict[str, tuple[Record, int]] = {}  # what fitted, and at how many layers it was looked at

    def check(self, state: State, names: Iterable[str]) -> None:
        """Refuse adapters that cannot be active in slots; nothing is changed.

        Raises:
            UnsupportedError: names the adapter and says why.
        """
        names = tuple(names)
        if len(names) > self.count:
            raise UnsupportedError(
                f"{len(names)} adapters are to be active ({', '.join(map(repr, names))}), and the model was prepared "
                f"for {self.count}; call prepare_for_compile(model, slots={len(names)}, ...)"
            )
        layers = list(state.layers())
        names = tuple(name for name in names if not self._is_checked(state, name, len(layers)))
        for layer in layers if names else ():
            bank = layer.__dict__.get("_bank")
            for name in names:
                reason = self.reason(layer, name)
                if reason is None and bank is not None and layer.has(name):
                    reason = bank.reason(layer, layer.entries[name][0])
                if reason is not None:
                    raise UnsupportedError(f"adapter {name!r} at {layer.site_path!r}: {reason}")
        self._checked.update({name: (state.record(name), len(layers)) for name in names})

    def _is_checked(self, state: State, name: str, layers: int) -> bool:
        record, looked_at = self._checked.get(name, (None, 0))
        return record is state.record(name) and looked_at == layers

    def check_all(self, state: State) -> None:
        """Refuse a model some of whose adapters can be in no slots, or not in the same; nothing is changed.

        Raises:
            UnsupportedError: names the adapter and says why.
        """
        if len(state.active) > self.count:
            self.check(state, state.active)
        for layer in state.layers():
            bank: Bank | None = None
            for name in layer.adapters_here():
                reason = self.reason(layer, name)
                if reason is None and bank is not None:
                    reason = bank.reason(layer, layer.entries[name][0])
                if reason is not None:
                    raise UnsupportedError(f"adapter {name!r} at {layer.site_path!r}: {reason}")
                bank = bank or Bank(layer, layer.entries[name][0], 1, 1)

    def reason(self, layer: Any, name: str) -> str | None:
        """Return why an adapter cannot be in a slot of a layer, or None."""
        if not layer.has(name):
            return None
        entries = layer.entries.get(name, ()) if isinstance(layer, AdaptedLayer) else ()
        if len(entries) != 1:
            return (
                "prepare_for_compile is for low-rank updates of layers alone, and this adapter has more than that here"
            )
        return unfit(layer, entries[0], self.max_rank)

    def follow(self, state: State) -> None:
        """Let the slots hold the adapters that are active now."""
        if not state.records:
            state.fixed = None
            return
        key = (state.active, *(id(layer) for layer in state.layers()))
        if key == self._placed:
            return
        self.check(state, state.active)
        for layer in state.layers():
            self.place(layer)
        self._placed = key

    def place(self, layer: Any) -> None:
        """Let one layer's slots hold what is active and not merged there."""
        if not isinstance(layer, AdaptedLayer) or not layer.entries:
            return
        bank = layer.__dict__["_bank"]
        if bank is None:
            like = next((held[0] for name, held in layer.entries.items() if self.reason(layer, name) is None), None)
            if like is None:
                return
            bank = Bank(layer, like, self.count, self.max_rank)
            layer.__dict__["_bank"] = bank
            if _loaded not in layer._load_state_dict_post_hooks.values():
                layer.register_load_state_dict_post_hook(_loaded)
        merged = layer.merged_names
        active = [layer.entries.get(name, (None,))[0] if name not in merged else None for name in layer.state.active]
        bank.hold(layer, [*active, *[None] * (self.count - len(active))])

    def release(self, state: State, adapter: str | None = None) -> None:
        """Give the tensors of an adapter, or of all, memory of their own; the next :meth:`follow` places them again."""
        self._placed = None
        self._checked.clear()
        for layer in state.layers():
            bank = layer.__dict__.get("_bank")
            if bank is not None:
                bank.release(adapter)

    def end(self, state: State) -> None:
        """Take the slots out of the model."""
        self.release(state)
        state.fixed = None
        for layer in state.layers():
            if layer.__dict__.get("_bank") is not None:
                layer.__dict__["_bank"] = None


def _loaded(layer: Any, _: Any) -> None:
    """After ``load_state_dict``, which may have put other parameters in."""
    bank = layer.__dict__["_bank"]
    if bank is not None:
        bank.renew(layer)
