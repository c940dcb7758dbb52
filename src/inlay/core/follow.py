"""What follows a model's state, unless it was given adapters (or a switch) of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from inlay.core.call import opened
from inlay.core.state import State
from inlay.errors import RoutingError

__all__ = ["Follower"]


class Follower(nn.Module):
    """Base of the modules that adapters put into a model: adapted layers and modules with full copies."""

    def join(self, state: State) -> None:
        """Follow ``state``, with nothing of one's own and nothing merged."""
        own = self.__dict__
        own["_state"] = state
        own["_own_active"] = None
        own["_own_enabled"] = None
        own["_merged"] = ()
        state.enter(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_state"].enter(self)

    @property
    def state(self) -> State:
        """The state shared by everything that adapters put into the model."""
        return self.__dict__["_state"]

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the active adapters in activation order, whether or not this module has them."""
        own = self.__dict__["_own_active"]
        return self.state.active if own is None else own

    @property
    def enabled(self) -> bool:
        """Whether adapters are on here."""
        own = self.__dict__["_own_enabled"]
        return self.state.enabled if own is None else own

    def override(self, active: tuple[str, ...] | None = None, enabled: bool | None = None) -> None:
        """Give this module active adapters (or an on/off switch) of its own; None leaves the old answer.

        Raises:
            UnsupportedError: the adapters cannot be active together here.
        """
        if active is not None:
            self.check_active(active)
            self.__dict__["_own_active"] = active
        if enabled is not None:
            self.__dict__["_own_enabled"] = enabled
        self.state.touch()

    def has(self, adapter: str) -> bool:
        """Whether an adapter has anything here."""
        raise NotImplementedError

    def called_by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run this module with the argument ``adapter_names``, an adapter for each sample of the batch.

        Raises:
            RoutingError: there is not one name for each sample.
        """
        kwargs = dict(kwargs)
        names = kwargs.pop("adapter_names")
        if names is None:
            return self(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if len(names) != len(x):
            raise RoutingError(f"adapter_names has {len(names)} names for a batch of {len(x)} samples")
        with opened(self.state, names=names):
            return self(*args, **kwargs)

    def check_active(self, names: Iterable[str]) -> None:
        """Refuse adapters that cannot be active together here."""
        raise NotImplementedError

    def follow(self) -> None:
        """Follow the model's state again."""
        self.__dict__["_own_active"] = self.__dict__["_own_enabled"] = None

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in activation order."""
        return list(self.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list if it is not exactly one."""
        active = self.active
        return active[0] if len(active) == 1 else list(active)
