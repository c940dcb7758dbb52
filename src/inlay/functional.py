"""Operations on a model with adapters, wrapped or bare, as functions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from inlay.checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from inlay.core.active import adapter_parameters, set_trainable
from inlay.core.dtype import adapter_dtype
from inlay.errors import UnsupportedError
from inlay.models import operate
from inlay.models.entry import inject_adapter_in_model
from inlay.models.root import state_of
from inlay.models.wrapper import Wrapper

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: Any = None
) -> None:
    """Activate one adapter or several, and no other; see :meth:`inlay.PeftModel.set_adapter`.

    Args:
        model: a model with adapters.
        adapter_name: name or names, in the order in which they apply.
        inference_mode: leave them frozen.
        layer_cls: accepted for callers of PEFT: adapted layers are found by themselves.

    Raises:
        StateError: the model has no adapters.
        UnknownAdapterError: there is no such adapter.
    """
    operate.activate(state_of(model), adapter_name, inference_mode)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str | None = None, layer_cls: Any = None
) -> list[str] | None:
    """Delete an adapter; see :meth:`inlay.PeftModel.delete_adapter`.

    Args:
        model: a model with adapters.
        adapter_name: which.
        prefix: accepted for callers of PEFT; checked against what the adapter's tensors begin with.
        layer_cls: accepted for callers of PEFT.

    Returns:
        The names of the adapters that are active now, or None where no adapter is left.

    Raises:
        StateError: the model has no adapters.
        UnknownAdapterError: there is no such adapter.
        UnsupportedError: its tensors have another prefix.
        MergeError: it is merged.
    """
    state = state_of(model)
    own = state.record(adapter_name).method.prefix
    if prefix is not None and prefix != own:
        raise UnsupportedError(f"adapter {adapter_name!r} has tensors that begin with {own!r}, not with {prefix!r}")
    root = model.get_base_model() if isinstance(model, Wrapper) else model
    operate.remove(root, state, adapter_name)
    return list(state.active) if state.records else None


def set_requires_grad(model: nn.Module, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
    """Switch gradients of adapters on or off, whether they are active or not.

    Raises:
        StateError: the model has no adapters.
        UnknownAdapterError: there is no such adapter.
    """
    set_trainable(state_of(model), operate.listed(adapter_names), requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Raise an adapter's half-precision parameters to float32.

    Args:
        model: a model with adapters.
        adapter_name: which.
        autocast_adapter_dtype: False does nothing.

    Raises:
        StateError: the model has no adapters.
        UnknownAdapterError: there is no such adapter.
    """
    state = state_of(model)
    state.record(adapter_name)
    if not autocast_adapter_dtype:
        return
    for parameter in adapter_parameters(state, [adapter_name]):
        dtype = adapter_dtype(parameter.dtype, True)
        if parameter.is_floating_point() and dtype != parameter.dtype:
            with torch.no_grad():
                parameter.data = parameter.data.to(dtype)
