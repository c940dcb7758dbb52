"""What a model's root module carries while the model has adapters.

The state, and the configurations by adapter name (``peft_config``, where integrations look for it). Tensors that
several layers share are registered by the core: at the bare model, or at ``base_model`` of the wrapper around it, which
gives them the names that PEFT gives them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.core.state import Record, State, find_state
from inlay.errors import StateError

__all__ = ["Configs", "mark", "state_of", "unmark"]


class Configs(dict[str, Any]):
    """Configurations by adapter name; assigning to a name changes what will be saved for that adapter."""

    def __init__(self, records: dict[str, Record]) -> None:
        self._records = records
        super().__init__(self._present())

    def _present(self) -> dict[str, Any]:
        return {name: record.config for name, record in self._records.items() if not record.slot}

    def __setitem__(self, name: str, config: Any) -> None:
        records = self.__dict__.get("_records")  # absent while a copy is being rebuilt
        if records is not None:
            if name not in records:
                raise StateError(f"no adapter {name!r} to give a configuration to; add it with add_adapter")
            records[name].config = config
        super().__setitem__(name, config)

    def refresh(self, name: str | None = None) -> None:
        """Follow what was added and deleted: one adapter, or whatever it was."""
        if name is not None:
            record = self._records.get(name)
            if record is None:
                self.pop(name, None)
            elif not record.slot:
                super().__setitem__(name, record.config)
            if len(self) == len(self._records):
                return
        self.clear()
        self.update(self._present())


def mark(root: nn.Module, state: State, name: str | None = None) -> None:
    """Make a bare model carry its state and configurations, as they are now; ``name`` alone has changed if given."""
    held = root.__dict__.get("peft_config")
    if not state.records:
        if isinstance(held, Configs):
            held.refresh()  # whoever holds it sees that the last adapter is gone
        unmark(root)
        return
    root.__dict__["_state"] = state
    if isinstance(held, Configs) and held._records is state.records:
        held.refresh(name)
    else:
        root.__dict__["peft_config"] = Configs(state.records)


def unmark(root: nn.Module) -> None:
    """Take off what :func:`mark` put on."""
    root.__dict__.pop("_state", None)
    if isinstance(root.__dict__.get("peft_config"), Configs):
        del root.__dict__["peft_config"]


def state_of(model: nn.Module) -> State:
    """Return the state of a model that has adapters.

    Raises:
        StateError: it has none.
    """
    state = find_state(model)
    if state is None:
        raise StateError(f"this {type(model).__name__} has no adapters")
    return state
