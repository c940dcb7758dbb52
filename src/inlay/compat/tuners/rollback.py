"""Going back to what a model was, after code of others changed it and failed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from inlay.core.state import State

__all__ = ["Snapshot", "undone_if_it_fails"]

_COPIED = (dict, list, set, OrderedDict)


class Snapshot:
    """Every module of a model with its attributes, and the state of its adapters; tensors are not copied.

    Args:
        root: the tuner around a model.
        state: the state of its adapters.
    """

    def __init__(self, root: nn.Module, state: State) -> None:
        modules = {id(module): module for held in (root, state.shared) for module in held.modules()}
        self._modules = [(module, _contents(module)) for module in modules.values()]
        self._grad = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._state = state
        self.replication = state.replication
        self._fields = {name: _copy(value) for name, value in vars(state).items()}

    def restore(self) -> None:
        """Give every module and the state their old attributes, and every parameter its ``requires_grad``."""
        for module, kept in self._modules:
            own = module.__dict__
            for name in own.keys() - kept.keys():
                del own[name]
            for name, (value, content) in kept.items():
                own[name] = value
                if content is not None:
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
        for parameter, flag in self._grad:
            parameter.requires_grad_(flag)
        records = self._state.records  # the same object stays: it is held elsewhere
        records.clear()
        records.update(self._fields["records"])
        for name, value in self._fields.items():
            if name != "records":
                setattr(self._state, name, value)
        self._state.touch()


def _copy(value: Any) -> Any:
    return type(value)(value) if type(value) in _COPIED else value


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return attributes with, for containers, what is in them."""
    return {name: (value, _copy(value) if type(value) in _COPIED else None) for name, value in module.__dict__.items()}


@contextmanager
def undone_if_it_fails(tuner: Any) -> Iterator[None]:
    """Put a tuner's model back if the block raises."""
    if tuner.__dict__.get("_guarded"):
        yield
        return
    snapshot = Snapshot(tuner, tuner.state)
    tuner.__dict__["_guarded"] = True
    try:
        yield
    except BaseException:
        replication = tuner.state.replication
        if replication is not None and snapshot.replication is None:
            replication.restore(tuner.model)  # it also changed what the model's config says
        snapshot.restore()
        raise
    finally:
        tuner.__dict__.pop("_guarded", None)
