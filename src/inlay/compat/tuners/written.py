"""Layers and tuners that users wrote, as a part of a model's state: followers that hang beside them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.tree import persistent_tensors
from inlay.core.call import call_in_force
from inlay.core.follow import Follower
from inlay.core.state import State
from inlay.errors import MergeError, RoutingError

__all__ = ["DICTS", "Written", "WrittenLayer"]

DICTS = (nn.ModuleDict, nn.ParameterDict)


class Written(Follower):
    """What both have in common: tensors by adapter name in containers below a module of a user's class.

    Args:
        held: the user's module.
        state: the state of the model.
        rename_key: the tuner's ``_remove_adapter_name_from_key``.
    """

    def __init__(self, held: nn.Module, state: State, rename_key: Callable[[str, str], str]) -> None:
        super().__init__()
        self.__dict__["_held_module"] = held
        self.__dict__["_rename_key"] = rename_key
        self.join(state)

    @property
    def standing(self) -> Any:
        return self.__dict__["_held_module"]

    def _passed(self) -> set[str]:
        """Names of children that are no adapter's."""
        return {self.base_attribute}

    def saved_tensors(self, adapter: str) -> Iterator[tuple[str, nn.Module, str]]:
        """Iterate over what stands beside the base: an adapter's part of each dict, and all that is no dict."""
        held: nn.Module = self.standing
        passed = self._passed()
        for name, child in held._modules.items():
            if child is None or name in passed:
                continue
            if not isinstance(child, DICTS):
                yield from ((f"{name}.{below}", owner, at) for below, owner, at in persistent_tensors(child))
            elif adapter in child:
                value: Any = child._modules.get(adapter)
                if value is None:
                    yield f"{name}.{adapter}", child, adapter
                else:
                    found = persistent_tensors(value)
                    yield from ((f"{name}.{adapter}.{below}", owner, at) for below, owner, at in found)
        for table in (held._parameters, held._buffers):
            for name, tensor in table.items():
                if tensor is not None and name not in held._non_persistent_buffers_set:
                    yield name, held, name

    def disk_key(self, key: str, adapter: str) -> str:
        renamed: str = self.__dict__["_rename_key"](key, adapter)
        return renamed

    def tensors_of(self, adapter: str) -> list[Tensor]:
        tables = ((at, owner._parameters, owner._buffers) for _, owner, at in self.saved_tensors(adapter))
        held = (parameters.get(at, buffers.get(at)) for at, parameters, buffers in tables)
        return [tensor for tensor in held if tensor is not None]

    def check_active(self, names: Iterable[str]) -> None:
        """What may be active together is the user's business."""


class WrittenLayer(Written):
    """Follows a state for a layer that a user wrote, by calling what ``BaseTunerLayer`` lets that layer override.

    Args:
        layer: the layer, which has ``base_layer``.
        path: where it stands in the model without adapters.
        state, rename_key: see above.
    """

    base_attribute = "base_layer"

    def __init__(self, layer: Any, path: str, state: State, rename_key: Callable[[str, str], str]) -> None:
        super().__init__(layer, state, rename_key)
        own = self.__dict__
        own["_path"] = path
        own["_kept"] = {}
        own["_handle"] = layer.register_forward_pre_hook(_by_sample, with_kwargs=True)
        layer.__dict__["_follower"] = self
        layer.follow_state(state)

    def change_state(self, state: State) -> None:
        super().change_state(state)
        self.standing.follow_state(state)

    # -- who is on ------------------------------------------------------------------------------------------------

    @property
    def is_apart(self) -> bool:
        return True  # it switches itself, so it must be told

    @property
    def active(self) -> tuple[str, ...]:
        return tuple(self.standing.active_adapters)

    @property
    def enabled(self) -> bool:
        return not self.standing.disable_adapters

    def override(self, active: tuple[str, ...] | None = None, enabled: bool | None = None) -> None:
        with self._gradients_kept():
            if active is not None:
                self.standing.set_adapter(list(active))
            if enabled is not None:
                self.standing.enable_adapters(enabled)
        self.state.touch()

    def follow(self) -> None:
        with self._gradients_kept():
            self.standing.set_adapter(list(self.state.active))

    @contextmanager
    def _gradients_kept(self) -> Iterator[None]:
        """Leave to the model who trains: PEFT's layers change that whenever they are switched."""
        before = [(parameter, parameter.requires_grad) for parameter in self.standing.parameters()]
        yield
        for parameter, flag in before:
            parameter.requires_grad_(flag)

    # -- what is here ---------------------------------------------------------------------------------------------

    @property
    def site_path(self) -> str:
        return str(self.__dict__["_path"])

    def move_below(self, before: str) -> None:
        self.__dict__["_path"] = before + self.site_path

    @property
    def type_name(self) -> str:
        return repr(self.standing).partition("(")[0]

    def adapters_here(self) -> list[str]:
        held = set(self.standing._all_available_adapter_names())
        return [name for name in self.state.records if name in held] + sorted(held - self.state.records.keys())

    def parameters_of(self, adapter: str) -> Iterator[tuple[nn.Parameter, bool]]:
        frozen = self.standing.frozen_peft_weight_names.get(adapter, ())
        for path, held in self.standing._held():
            if adapter not in held:
                continue
            value = held[adapter]
            parameters = value.parameters() if isinstance(value, nn.Module) else (value,)
            for parameter in parameters:
                if isinstance(parameter, nn.Parameter):
                    yield parameter, path not in frozen

    def train_adapter(self, adapter: str, trainable: bool) -> None:
        self.standing.set_requires_grad([adapter], trainable)

    def drop_adapter(self, adapter: str) -> None:
        if not self.has(adapter):
            return
        with self._gradients_kept():
            with warnings.catch_warnings():  # the model says once which adapter is active then
                warnings.simplefilter("ignore")
                self.standing.delete_adapter(adapter)
            self.standing.set_adapter([name for name in self.state.active if name != adapter])

    def taken_out(self, restore: bool) -> nn.Module:
        layer = self.standing
        if restore and self.merged_names:
            self.unmerge()
        self.__dict__["_handle"].remove()
        layer.__dict__.pop("_follower", None)
        layer.follow_state(None)
        base: nn.Module = layer._modules.get(self.base_attribute, layer)
        return base

    # -- merging --------------------------------------------------------------------------------------------------

    @property
    def merged_names(self) -> tuple[str, ...]:
        return tuple(self.standing.merged_adapters)

    @property
    def merges_itself(self) -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let the layer merge; its base is as before if that fails.

        Raises:
            MergeError: a merged tensor is not finite.
        """
        layer = self.standing
        held = dict(_base_tensors(layer))
        before = {name: tensor.detach().to("cpu", copy=True) for name, tensor in held.items()}
        merged = list(layer.merged_adapters)
        try:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            for name, tensor in _base_tensors(layer):
                if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                    raise MergeError(
                        f"{self.site_path!r}: merging {adapter_names} gives a {name} that is not finite in "
                        f"{tensor.dtype}; no weight of the layer was changed"
                    )
        except BaseException:
            _write(layer, before)
            layer.merged_adapters = merged
            raise
        if not merged:
            self.__dict__["_kept"] = before

    def unmerge(self) -> None:
        """Let the layer unmerge, and put its original weights back, bitwise."""
        layer, kept = self.standing, self.__dict__["_kept"]
        layer.unmerge()
        if not layer.merged_adapters and kept:
            _write(layer, kept)
            self.__dict__["_kept"] = {}


def _base_tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    base = layer.get_base_layer()
    yield from base.named_parameters()
    yield from base.named_buffers()


@torch.no_grad()
def _write(layer: Any, tensors: dict[str, Tensor]) -> None:
    for name, tensor in _base_tensors(layer):
        if name in tensors:
            tensor.copy_(tensors[name])


def _by_sample(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tell a layer which adapter serves which sample, if it can tell samples apart.

    Raises:
        RoutingError: it cannot.
    """
    follower = layer.__dict__.get("_follower")
    call = None if follower is None else call_in_force(follower.state, layer.training)
    if call is None or call.names is None or call.disabled or "adapter_names" in kwargs:
        return None
    if not hasattr(layer, "_mixed_batch_forward"):
        raise RoutingError(
            f"{follower.site_path!r}: {type(layer).__name__} has no _mixed_batch_forward, so it cannot use different "
            "adapters for the samples of one batch"
        )
    x = args[0] if args else next(iter(kwargs.values()))
    return args, {**kwargs, "adapter_names": list(call.names_for(x))}
