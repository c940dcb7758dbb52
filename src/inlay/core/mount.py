"""A full copy of a module per adapter (``modules_to_save``): a mount over any module, not a method."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from inlay.core.active import the_one
from inlay.core.call import call_in_force, call_of
from inlay.core.follow import Follower
from inlay.core.hanging import forget_unused
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

    base_attribute = "original_module"

    @property
    def site_path(self) -> str:
        return str(self.__dict__["path"])

    def move_below(self, before: str) -> None:
        self.__dict__["path"] = before + self.__dict__["path"]

    def adapters_here(self) -> list[str]:
        return list(self.modules_to_save._modules)

    @property
    def is_bare(self) -> bool:
        return not self.modules_to_save._modules

    def has(self, adapter: str) -> bool:
        return adapter in self.modules_to_save._modules

    def parameters_of(self, adapter: str) -> Iterator[tuple[nn.Parameter, bool]]:
        held = self.modules_to_save._modules.get(adapter)
        for parameter in () if held is None else held.parameters():
            yield parameter, True

    def tensors_of(self, adapter: str) -> list[Tensor]:
        return [parameter for parameter, _ in self.parameters_of(adapter)]

    def drop_adapter(self, adapter: str) -> None:
        self.modules_to_save._modules.pop(adapter, None)

    def taken_out(self, restore: bool) -> nn.Module:
        return self.original_module if restore else self.current()

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

    # -- what PEFT's users and integrations call on one module ---------------------------------------------------

    adapter_layer_names = ("modules_to_save",)
    other_param_names = ()

    @property
    def merged_adapters(self) -> list[str]:
        """Nothing is ever merged: the active copy stands for itself."""
        return []

    @property
    def disable_adapters(self) -> bool:
        """Whether the original runs, also for the call that is running only."""
        call = call_of(self.state)
        return not self.enabled or (call is not None and call.disabled)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters that have a copy here, in activation order."""
        return [name for name in self.active if name in self.modules_to_save._modules]

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list if it is not exactly one that has a copy here."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.active_adapter

    @property
    def _disable_adapters(self) -> bool:
        return self.disable_adapters

    @property
    def _adapters(self) -> set[str]:
        return self._get_available_adapters()

    def update(self, adapter_name: str, tied_module: Any = None, **kwargs: Any) -> None:
        """Give a further adapter its copy, unless it has one; an active adapter's trains.

        Args:
            tied_module: an embedding whose weight the copy, a linear layer, shares.
        """
        if not self.has(adapter_name):
            copy: Any = None
            if tied_module is not None:
                rows, columns = tied_module.weight.shape
                copy = nn.Linear(columns, rows, bias=False, device="meta")
                copy.weight = tied_module.weight
            self.add(adapter_name, copy)
        self.original_module.requires_grad_(False)
        self.set_requires_grad(adapter_name, adapter_name in self.active)

    def _get_available_adapters(self) -> set[str]:
        """Return the names of the adapters that have a copy here."""
        return set(self.modules_to_save._modules)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Return which of some adapters has a copy here to be activated, or None.

        Raises:
            UnsupportedError: more than one has.
            TargetError: no adapter was named.
        """
        return the_one(adapter_name, self.modules_to_save._modules, f"{self.path!r}: only one full copy can run")

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Let an adapter's copy run here, whatever is active elsewhere; it trains unless ``inference_mode``.

        Inference mode leaves its gradients as they are; under PEFT's policy it switches them off.

        Raises:
            UnsupportedError: several names were given.
            UnknownAdapterError: there is no adapter of that name.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        if len(names) > 1:
            raise UnsupportedError(
                f"{self.path!r}: only one full copy can be activated, found {', '.join(map(repr, names))}"
            )
        for name in names:
            if not self.has(name):
                self.state.record(name)
        self.set_requires_grad(self.active_adapters, False)
        self.override(active=names)
        if not inference_mode or self.state.policy.peft_layers:
            self.set_requires_grad(names, not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active copy run here, or the original; this module no longer follows the model's switch."""
        self.override(enabled=enabled)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters' copies on or off."""
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.train_adapter(name, requires_grad)
            if requires_grad:
                self.state.training.add(name)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Iterable[str] | None = None) -> None:
        """Drop an adapter's copy here. If it ran, one of ``new_active_adapters`` runs next, or the original.

        Raises:
            UnsupportedError: several names were given.
        """
        if adapter_name not in self.modules_to_save._modules:
            return
        names = tuple(new_active_adapters or ())
        if len(names) > 1:
            raise UnsupportedError(
                f"{self.path!r}: only one full copy can be activated, found {', '.join(map(repr, names))}"
            )
        following = [name for name in names if name in self.modules_to_save._modules and name != adapter_name]
        if adapter_name in self.active_adapters:
            self.set_adapter(following)
        del self.modules_to_save._modules[adapter_name]
        forget_unused(self.state, adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the names of a copy's tensors in a checkpoint, with those that they have below this module."""
        held = self.modules_to_save._modules.get(adapter_name)
        names = () if held is None else held.state_dict()
        return {name: f"modules_to_save.{adapter_name}.{name}" for name in names}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Pick a copy's tensors out of this module's ``state_dict``, under the names of a checkpoint."""
        return {name: state_dict[here] for name, here in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return what is to stand here without adapters: the copy that runs, or the original."""
        return self.current()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "adapter_names" in kwargs:
            return self.called_by_name(args, kwargs)
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
