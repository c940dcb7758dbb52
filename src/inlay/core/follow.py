"""What follows a model's state, unless it was given adapters (or a switch) of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.core.bare import Light, begin
from inlay.core.call import opened
from inlay.core.state import BASE, State
from inlay.errors import RoutingError

__all__ = ["Follower", "base_modules", "follower_of"]


class Follower(Light):
    """Base of what adapters put into a model: adapted layers, modules with full copies, and layers that others wrote.

    The first two stand in the model themselves. A layer that others wrote does so too, and a follower that hangs beside
    it answers for it (:func:`follower_of`).

    A follower that stands in the model answers for the attributes of what it covers, so the names here are such as no
    layer has.

    Class attributes:
        base_attribute: the attribute that holds the module that was there before.
    """

    base_attribute: ClassVar[str]
    _eager = ("_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks")

    def __init__(self) -> None:
        begin(self)

    def join(self, state: State) -> None:
        """Follow ``state``, with nothing of one's own and nothing merged."""
        own = self.__dict__
        own["_state"] = state
        own["_own_active"] = None
        own["_own_enabled"] = None
        own["_merged"] = ()
        state.enter(self)

    def change_state(self, state: State) -> None:
        """Follow another state, with everything as it is."""
        self.__dict__["_state"] = state
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
    def is_apart(self) -> bool:
        """Whether something here is not just what the state says."""
        return self.__dict__["_own_active"] is not None or self.__dict__["_own_enabled"] is not None

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
        self.state.set_apart(self)
        self.state.touch()

    # -- what each class says of itself ---------------------------------------------------------------------------

    @property
    def standing(self) -> nn.Module:
        """The module in the model that this answers for."""
        return self

    @property
    def site_path(self) -> str:
        """Where it stands in the model without adapters."""
        raise NotImplementedError

    def move_below(self, before: str) -> None:
        """Put ``before`` in front of its path: the model became a part of a larger one."""
        raise NotImplementedError

    def adapters_here(self) -> list[str]:
        """Return the adapters that have anything here, in the order of adding."""
        raise NotImplementedError

    @property
    def is_bare(self) -> bool:
        """Whether no adapter has anything here."""
        return not self.adapters_here()

    def has(self, adapter: str) -> bool:
        """Whether an adapter has anything here."""
        return adapter in self.adapters_here()

    def parameters_of(self, adapter: str) -> Iterator[tuple[nn.Parameter, bool]]:
        """Iterate over an adapter's parameters here, with whether each may train."""
        raise NotImplementedError

    def tensors_of(self, adapter: str) -> list[Tensor]:
        """Return an adapter's tensors here."""
        raise NotImplementedError

    @property
    def type_name(self) -> str:
        """What a status calls it."""
        return type(self.standing).__name__

    def saved_tensors(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Iterate over tensors that no slot and no copy describes: (name below the module, holder, attribute)."""
        return iter(())

    def disk_key(self, key: str, adapter: str) -> str:
        """Return what a checkpoint calls one of :meth:`saved_tensors`, whose whole name in the model is ``key``."""
        return key

    def drop_adapter(self, adapter: str) -> None:
        """Take out what an adapter has here."""
        raise NotImplementedError

    def taken_out(self, restore: bool) -> nn.Module:
        """Return what is to stand here without adapters, unmerged if ``restore``."""
        raise NotImplementedError

    def train_adapter(self, adapter: str, trainable: bool) -> None:
        """Switch an adapter's gradients on or off here; what never trains stays off."""
        for parameter, may_train in self.parameters_of(adapter):
            if may_train and parameter.is_floating_point():
                parameter.requires_grad_(trainable)

    @property
    def merged_names(self) -> tuple[str, ...]:
        """Adapters that are merged into the base here, in the order of merging."""
        return self.__dict__["_merged"]

    @property
    def merges_itself(self) -> bool:
        """Whether it has a ``merge`` and ``unmerge`` of its own, which merging the model is to call."""
        return False

    def called_by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run this module with the argument ``adapter_names``, an adapter for each sample of the batch.

        Raises:
            RoutingError: there is not one name for each sample.
            UnknownAdapterError: the model has no adapter of a name; under PEFT's policy such samples get none.
        """
        kwargs = dict(kwargs)
        names = kwargs.pop("adapter_names")
        if names is None:
            return self(*args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        if len(names) != len(x):
            raise RoutingError(f"adapter_names has {len(names)} names for a batch of {len(x)} samples")
        if not self.state.policy.peft_layers:
            for name in dict.fromkeys(names):
                if name != BASE:
                    self.state.record(name)
        with opened(self.state, names=names):
            return self(*args, **kwargs)

    def check_active(self, names: Iterable[str]) -> None:
        """Refuse adapters that cannot be active together here."""
        raise NotImplementedError

    def follow(self) -> None:
        """Follow the model's state again."""
        self.__dict__["_own_active"] = self.__dict__["_own_enabled"] = None
        self.state.set_apart(self)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in activation order."""
        return list(self.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list if it is not exactly one."""
        active = self.active
        return active[0] if len(active) == 1 else list(active)


def base_modules(root: nn.Module) -> list[nn.Module]:
    """Return ``root`` and the modules below it, each once and in the order of ``modules()``.

    What hangs below a follower, of any number of adapters, is passed over: only what it stands for is entered.
    """
    found: dict[int, nn.Module] = {}
    todo: list[Any] = [root]
    while todo:
        module = todo.pop()
        if module is None or id(module) in found:
            continue
        found[id(module)] = module
        below = module._modules
        if not below:
            continue
        if isinstance(module, Follower):
            todo.append(below.get(module.base_attribute))
        else:
            todo.extend(reversed(below.values()))
    return list(found.values())


def follower_of(module: nn.Module) -> Follower | None:
    """Return what answers for a module that adapters put into a model, or None for any other module."""
    return module if isinstance(module, Follower) else module.__dict__.get("_follower")
