"""The chain of a layer: which adapters run on it, resolved once per version of the state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from inlay.core.call import Call
from inlay.core.entry import Entry
from inlay.core.surface import LayerSurface
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.core.ready import NotReady
    from inlay.core.state import State

__all__ = ["ChainHolder"]

# names of this module, since looking them up in torch takes as long as calling them; what other tracers than dynamo
# hand in is of a class of its own, which ``core.ready`` sees
_is_grad_enabled, _is_traced = torch.is_grad_enabled, torch.compiler.is_dynamo_compiling


class ChainHolder(LayerSurface):
    """Has a chain over its base layer, and knows whether the chain is one sum of low-rank updates."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # before torch's own call, which costs as much as a small product
        if not _is_grad_enabled() and not _is_traced() and len(args) == 1 and not kwargs:
            ready = self.__dict__["_ready"]
            if ready is None or ready.version != ready.state.version:
                ready = self._make_ready()
            y = ready.run(args[0])
            if y is not None:
                return y
        return super().__call__(*args, **kwargs)

    def join(self, state: State) -> None:
        super().join(state)
        self._forget_chain()

    def change_state(self, state: State) -> None:
        super().change_state(state)
        self._forget_chain()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_chain()
        for entry in self._each():
            entry.compiled = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy has places of its own, or none, and resolves what runs for itself
        return {**self.__dict__, "_bank": None, "_ready": None, "_ready_by_name": (-1, {})}

    def _forget_chain(self) -> None:
        own = self.__dict__
        own["_chain"] = (-1, ())
        own["_ready"] = None  # the short way without gradient, for one version of the state
        own["_ready_by_name"] = (-1, {})  # the same for each adapter on its own
        own["_fused"] = (-1, {})  # chain -> why it is not fused, or None

    def check_active(self, names: Iterable[str]) -> None:
        """Refuse adapters that cannot be active together here, on top of what is merged.

        Raises:
            UnsupportedError: names the two and says why.
        """
        names, merged = tuple(names), self.__dict__["_merged"]
        if len(names) == 1 and not merged and len(self.__dict__["entries"].get(names[0], ())) < 2:
            return
        below: list[Entry] = []
        for name in dict.fromkeys((*merged, *names)):
            for entry in self.entries.get(name, ()):
                for other in below:
                    reason = entry.method.conflict(entry.site, other.method)
                    if reason is not None:
                        raise UnsupportedError(
                            f"{self.site.name!r}: {name!r} and {other.name!r} cannot be active together: {reason}"
                        )
                below.append(entry)

    def _resolve(self) -> tuple[Entry, ...]:
        if not self.enabled:
            return ()
        return self._entries_of(self.active)

    def _entries_of(self, names: tuple[str, ...]) -> tuple[Entry, ...]:
        merged = self._merged
        return tuple(entry for name in names if name not in merged for entry in self.entries.get(name, ()))

    def chain(self, call: Call | None = None) -> tuple[Entry, ...]:
        """Entries over the base layer, the lowest first, as the state says, or the call that is in force."""
        own = self.__dict__
        if call is not None and call.active is not None and own["_own_active"] is None:
            return self._entries_of(call.active) if self.enabled else ()
        if torch.compiler.is_compiling():
            if own["_bank"] is not None and own["_own_active"] is None:
                return own["_bank"].entries if self.enabled else ()
            return self._resolve()
        version = own["_state"].version
        cached = own["_chain"]
        if cached[0] != version:
            cached = (version, self._resolve())
            own["_chain"] = cached
        found: tuple[Entry, ...] = cached[1]
        return found

    def _make_ready(self) -> NotReady:
        """Resolve the short way without gradient for the state as it is."""
        from inlay.core.ready import ready_for

        found = self.__dict__["_ready"] = ready_for(self, self._resolve())  # type: ignore[arg-type]  # its subclass
        return found

    def why_not_fused(self, chain: tuple[Entry, ...]) -> str | None:
        """Return why a chain cannot run as one sum of low-rank updates, whatever the input is, or None."""
        from inlay.core.fused import chain_reason

        version = self.__dict__["_state"].version
        held = self.__dict__["_fused"]
        if held[0] != version:
            held = self.__dict__["_fused"] = (version, {})
        reasons: dict[tuple[Entry, ...], str | None] = held[1]
        if chain not in reasons:
            with torch.no_grad():
                reasons[chain] = chain_reason(self, chain)  # type: ignore[arg-type]
        return reasons[chain]
