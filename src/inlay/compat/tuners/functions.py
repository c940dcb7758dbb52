"""Functions of PEFT's module ``tuners.tuners_utils`` (and of ``peft.functional``, which shows some of them)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from inlay.compat.layers.auxiliary import AuxiliaryTrainingWrapper
from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.layers.making import widths
from inlay.compat.tuners.matching import (
    _check_lora_target_modules_mamba,
    _ExcludedModule,
    _extend_unique,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    inspect_matched_modules,
)
from inlay.core import storage
from inlay.core.dtype import adapter_dtype
from inlay.core.replicate import replicate
from inlay.core.state import find_state
from inlay.errors import ConfigTypeError, InlayWarning, MergeError
from inlay.models import operate

__all__ = [
    "_ExcludedModule",
    "_check_adapters_not_merged",
    "_check_lora_target_modules_mamba",
    "_delete_auxiliary_adapter",
    "_extend_unique",
    "_filter_state_dict_by_key_prefixes",
    "_find_minimal_target_modules",
    "_get_in_out_features",
    "_get_tuner_state_dict_key_prefixes",
    "_is_key_under_prefixes",
    "_maybe_include_all_linear_layers",
    "_remove_adapter_name_from_state_dict_key",
    "_torch_supports_distributed",
    "_torch_supports_dtensor",
    "cast_adapter_dtype",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "clone_module",
    "delete_adapter",
    "find_parameter_name_by_module",
    "get_device_map",
    "inspect_matched_modules",
    "onload_layer",
    "replicate_layers",
    "set_adapter",
    "set_requires_grad",
    "warn_msg_weight_tying",
]

_torch_supports_distributed = torch.distributed.is_available()
_torch_supports_dtensor = _torch_supports_distributed
warn_msg_weight_tying = (
    "a layer that shares its weight with another one is adapted alone, and its method cannot adapt both together; "
    "merging it, or a format that writes shared weights once, would lose the difference"
)


# -- what is on, and what trains --------------------------------------------------------------------------------------


def _layers(model: nn.Module, layer_cls: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, layer_cls)]


def set_adapter(
    model: nn.Module, adapter_name: str | list[str], inference_mode: bool = False, layer_cls: Any = BaseTunerLayer
) -> None:
    """Activate adapters in a model, in this order, and no others.

    Args:
        model: bare or wrapped.
        adapter_name: name or names.
        inference_mode: leave them frozen.
        layer_cls: only layers of this class; the others stay as they are.
    """
    state = find_state(model)
    names = operate.listed(adapter_name, "adapter_name")
    if layer_cls is BaseTunerLayer and state is not None and all(name in state.records for name in names):
        if any(layer.merged_names for layer in state.layers()):
            warnings.warn(
                "adapters are merged and were unmerged, because others are activated", InlayWarning, stacklevel=2
            )
            operate.unmerge_all(state)
        operate.activate(state, names, inference_mode)
        return
    for layer in _layers(model, layer_cls):
        if layer.merged:
            warnings.warn("a merged layer was unmerged, because others are activated", InlayWarning, stacklevel=2)
            layer.unmerge()
        layer.set_adapter(adapter_name, inference_mode=inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Switch gradients of adapters on or off, whether they are active or not; names that are nowhere do nothing."""
    names = operate.listed(adapter_names)
    for layer in _layers(model, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        layer.set_requires_grad(adapter_names=names, requires_grad=requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: Any = BaseTunerLayer
) -> list[str] | None:
    """Delete an adapter from the layers of a model.

    Args:
        model: bare or wrapped.
        adapter_name: which.
        prefix: what the names of the method's tensors begin with; nothing is looked for below such names.
        layer_cls: only layers of this class.

    Returns:
        What is active in the first layer then, None where there is no layer.

    Raises:
        MergeError: it is merged; nothing was deleted.
    """
    _check_adapters_not_merged(model, adapter_name)
    left: list[str] | None = None
    for layer in _layers(model, layer_cls):
        layer.delete_adapter(adapter_name)
        left = list(layer.active_adapters) if left is None else left
    _delete_auxiliary_adapter(model, adapter_name, left)
    return left


def _delete_auxiliary_adapter(model: nn.Module, adapter_name: str, new_active_adapters: list[str] | None) -> None:
    """Delete an adapter's full copies and token rows; ``new_active_adapters`` run next."""
    for module in _layers(model, AuxiliaryTrainingWrapper):
        module.delete_adapter(adapter_name, new_active_adapters=new_active_adapters)


def _check_adapters_not_merged(model: nn.Module, adapter_names: str | Sequence[str]) -> None:
    """Refuse adapters that are merged somewhere.

    Raises:
        MergeError: names them.
    """
    wanted = set(operate.listed(adapter_names))
    merged = sorted(wanted & {name for layer in _layers(model, BaseTunerLayer) for name in layer.merged_adapters})
    if merged:
        raise MergeError(f"{', '.join(map(repr, merged))} cannot be deleted while merged; unmerge first")


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Raise what an adapter has in half precision, parameters and buffers, to float32, unless told not to."""
    if not autocast_adapter_dtype:
        return
    for layer in _layers(model, BaseTunerLayer):
        below = [child for name, child in layer._modules.items() if child is not None and name != "base_layer"]
        for module in (module for child in below for module in child.modules()):
            if isinstance(module, (nn.ModuleDict, nn.ParameterDict)) and adapter_name in module:
                held: Any = module[adapter_name]
                for tensor in [*held.parameters(), *held.buffers()] if isinstance(held, nn.Module) else [held]:
                    dtype = adapter_dtype(tensor.dtype, True)
                    if tensor.is_floating_point() and tensor.dtype != dtype:
                        tensor.data = tensor.data.to(dtype)


def check_adapters_to_merge(module: Any, adapter_names: list[str] | None = None) -> list[str]:
    """Return which adapters a layer still has to merge, by default of the active ones; warns about merged ones.

    Raises:
        ConfigTypeError: ``adapter_names`` is a string.
    """
    if isinstance(adapter_names, str):
        raise ConfigTypeError(f"adapter_names: expected a list of names, found the string {adapter_names!r}")
    wanted = list(module.active_adapters if adapter_names is None else adapter_names)
    if not module.merged:
        return wanted
    left = [name for name in wanted if name not in module.merged_adapters]
    also = f"; {', '.join(left)} is merged on top" if left else ", so there is nothing to merge"
    warnings.warn(f"{', '.join(module.merged_adapters)} is merged already{also}", InlayWarning, stacklevel=2)
    return left


# -- keys -------------------------------------------------------------------------------------------------------------


def _remove_adapter_name_from_state_dict_key(key: str, adapter_name: str) -> str:
    """Take the adapter's name, the last part of a key or the one before, out of it."""
    parts = key.split(".")
    for place in (-1, -2):
        if len(parts) > -place and parts[place] == adapter_name:
            del parts[place]
            break
    return ".".join(parts)


def _get_tuner_state_dict_key_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Return what the names of all tensors begin with that tuners and their layers hold beside the model itself.

    Args:
        model: bare or wrapped.
        adapter_name: leaves out what dicts by adapter name hold for others.
    """
    from inlay.compat.tuners.base import BaseTuner

    found: set[str] = set()
    auxiliary: set[str] = set()
    named: Any = model.named_modules()
    for path, module in named:
        path = path.removeprefix("_fsdp_wrapped_module.")
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, BaseTunerLayer):
            auxiliary.add(path)
        elif isinstance(module, BaseTuner) or (
            isinstance(module, BaseTunerLayer) and not _is_key_under_prefixes(path, auxiliary)
        ):
            holder: Any = module
            for name, held in {**holder._modules, **holder._parameters, **holder._buffers}.items():
                if held is None or name in ("base_layer", "model"):
                    continue
                start = f"{path}.{name}" if path else name
                if adapter_name is None or not isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
                    found.add(start)
                elif adapter_name in held:
                    found.add(f"{start}.{adapter_name}")
    return found


def _is_key_under_prefixes(key: str, prefixes: set[str]) -> bool:
    """Whether a dotted name is one of some names or lies below one."""
    parts = key.split(".")
    return any(".".join(parts[:end]) in prefixes for end in range(1, len(parts) + 1))


def _filter_state_dict_by_key_prefixes(state_dict: dict[str, Any], prefixes: set[str]) -> dict[str, Any]:
    """Return the entries whose names are some names or lie below one."""
    return {key: value for key, value in state_dict.items() if _is_key_under_prefixes(key, prefixes)}


# -- modules ----------------------------------------------------------------------------------------------------------


def _get_in_out_features(module: nn.Module) -> tuple[int | None, int | None]:
    """Return a layer's widths as it says them, (None, None) with a warning where it says none."""
    found = widths(module)
    if found == (None, None):
        warnings.warn(
            f"{type(module).__name__} does not say how wide its input and output are", InlayWarning, stacklevel=2
        )
    return found


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """Return the path of a module in a model, "" where it is not there."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """Return where the parts of a model are, by path, as accelerate put them; a whole model is at the path ""."""
    spread: dict[str, Any] | None = getattr(model, "hf_device_map", None)
    return {"": next(model.parameters()).device} if spread is None else spread


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """Bring an offloaded layer's tensors in for as long as the block runs."""
    with storage.onloaded(getattr(layer, "base_layer", layer)):
        yield


def clone_module(module: nn.Module, share_weights: bool = False) -> nn.Module:
    """Return a copy of a module, which holds the very same parameters if ``share_weights``."""
    same: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()} if share_weights else {}
    return copy.deepcopy(module, same)


def replicate_layers(model: nn.Module, layer_map: Iterable[tuple[int, int]]) -> None:
    """Repeat blocks of a model, as ``layer_replication`` says, in place; they share their weights.

    Raises:
        UnsupportedError: the model has no list of blocks.
        ConfigError: a range lies outside of it.
    """
    replicate(model, layer_map).install(model)
