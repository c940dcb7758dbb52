"""A full copy of a module per adapter (``modules_to_save``): a mount over any module, not a method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from inlay.core.call import call_in_force
from inlay.core.follow import Follower
from inlay.core.route import split_rows
from inlay.core.state import BASE, State
from inlay.errors import RoutingError, UnsupportedError
from inlay.parallel.hooks import copied

__all__ = ["ModuleCopies"]


class ModuleCopies(Follower):
    """Stands where a module stood; the active adapter's copy runs in its place.

    Memory names are PEFT's: ``original_module`` and ``modules_to_save.<adapter>``. A checkpoint holds the copy under
    the module's own path. If several active adapters have a copy, the last one in activation order runs; PEFT's
    policy refuses that.
    """

    original_module: nn.Module
    modules_to_save: nn.ModuleDict

    def __init__(self, path: str, original: nn.Module, state: State) -> None:
        super().__init__()
        self.__dict__["path"] = path
        self._modules["original_module"] = original
        self._modules["modules_to_save"] = nn.ModuleDict()
        self.training = original.training
        self.join(state)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_modules" not in self.__dict__:
                raise
            return self._attribute(name)

    def _attribute(self, name: str) -> Any:
        """Return an attribute of the module that runs; code may read a weight and never call the module."""
        call = call_in_force(self.state, self.training)
        if call is not None:
            if call.disabled:
                return getattr(self.original_module, name)
            if call.names is not None and self.enabled:
                served = {id(held): held for held in map(self.copy_of, call.names)}
                values = [getattr(held, name) for held in served.values()]
                if len(values) > 1 and any(isinstance(value, Tensor) for value in values):
                    raise RoutingError(
                        f"{name!r} of {self.path!r} was read while samples of one batch use different copies of "
                        "that module; only a call of the module can tell them apart"
                    )
                return values[0]
            if call.active is not None:
                return getattr(self.current(call.active), name)
        return getattr(self.current(), name)

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return bool(self.current()._qkv_same_embed_dim)  # nn.TransformerEncoderLayer asks its attention for it

    def check_active(self, names: Iterable[str]) -> None:
        """Refuse, under PEFT's policy, two adapters that both want their copy to run.

        Raises:
            UnsupportedError: names them.
        """
        wanted = [name for name in names if name in self.modules_to_save._modules]
        if len(wanted) > 1 and self.state.policy.peft_layers:
            raise UnsupportedError(
                f"{self.path!r}: {', '.join(map(repr, wanted))} cannot be active together, because each of them has a "
                "full copy of it (modules_to_save), and only one can run"
            )

    def add(self, name: str, module: nn.Module | None = None) -> None:
        """Give an adapter its copy: ``module``, or a copy of the original that trains."""
        if module is None:
            module = copied(self.original_module)
        self.modules_to_save._modules[name] = module

    def copy_of(self, name: str) -> nn.Module:
        """Return an adapter's copy, or the original where it has none."""
        held = self.modules_to_save._modules.get(name)
        return self.original_module if held is None else held

    def current(self, active: tuple[str, ...] | None = None) -> nn.Module:
        """Return the module that runs now, or with other adapters active."""
        if not self.enabled:
            return self.original_module
        copies = self.modules_to_save._modules
        for name in reversed(self.active if active is None else active):
            if name in copies:
                return copies[name]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = call_in_force(self.state, self.training)
        if call is not None:
            if call.disabled:
                return self.original_module(*args, **kwargs)
            if call.names is not None and self.enabled:
                held = self.modules_to_save._modules
                x = args[0] if args else next(iter(kwargs.values()))
                names = tuple(name if name in held else BASE for name in call.names_for(x))
                if len(set(names)) == 1:
                    return self.copy_of(names[0])(*args, **kwargs)
                return split_rows(
                    type(self.original_module).__name__,
                    names,
                    lambda name, a, k: self.copy_of(name)(*a, **k),
                    args,
                    kwargs,
                )
            if call.active is not None:
                return self.current(call.active)(*args, **kwargs)
        return self.current()(*args, **kwargs)
