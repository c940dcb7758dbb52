"""PEFT's module ``utils.integrations``: devices, meta tensors, sharded and quantised parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from inlay.core import storage
from inlay.errors import UnsupportedError
from inlay.parallel.tensors import rewrap

__all__ = [
    "TpInfo",
    "check_deepspeed_zero3_enabled",
    "dequantize_bnb_weight",
    "dequantize_module_weight",
    "dtensor_from_local_like",
    "gather_params_ctx",
    "get_bnb_param_type",
    "get_layer_device_map",
    "init_empty_weights",
    "map_cache_to_layer_device_map",
    "skip_init_on_device",
]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class TpInfo:
    """How a model is spread by tensor parallelism: the style of each module, the mesh, and its size."""

    tp_plan: dict[str, str]
    device_mesh: Any
    tp_size: int


def dtensor_from_local_like(local_tensor: Tensor, ref: Tensor) -> Tensor:
    """Return a distributed tensor with this process's part, placed as ``ref`` is."""
    return rewrap(local_tensor, ref)


def check_deepspeed_zero3_enabled() -> bool:
    """Whether transformers was told that DeepSpeed's ZeRO-3 is in use."""
    try:
        from transformers.integrations import is_deepspeed_zero3_enabled
    except ImportError:
        return False
    return bool(is_deepspeed_zero3_enabled())


@contextmanager
def gather_params_ctx(
    param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0, fwd_module: nn.Module | None = None
) -> Iterator[None]:
    """Have parameters whole inside the block, where ZeRO-3 keeps them in parts; otherwise do nothing."""
    around: Any = nullcontext()
    if check_deepspeed_zero3_enabled():
        import deepspeed

        around = deepspeed.zero.GatheredParameters(param, modifier_rank=modifier_rank, fwd_module=fwd_module)
    with around:
        yield


def get_bnb_param_type(param: Tensor) -> Literal[False, "4bit", "8bit"]:
    """Return how bitsandbytes holds a parameter, False for any other."""
    name = type(param).__name__
    if name == "Params4bit":
        return "4bit"
    return "8bit" if name == "Int8Params" else False


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """Return a module's weight in floating point; where it is plain, the parameter itself.

    Raises:
        UnsupportedError: it is quantised in a way that cannot be read.
    """
    if hasattr(module, "W_q"):  # HQQ keeps no `weight`
        return module.dequantize()  # type: ignore[operator]
    weight = module.weight
    if get_bnb_param_type(weight):  # type: ignore[arg-type]
        return dequantize_bnb_weight(weight, getattr(module, "state", None))  # type: ignore[arg-type]
    if isinstance(weight, nn.Parameter) and weight.is_floating_point():
        return weight
    return storage.read(module, "weight")


def dequantize_bnb_weight(weight: Tensor, state: Any = None) -> Tensor:
    """Return a weight of bitsandbytes in floating point.

    Args:
        weight: a ``Params4bit`` or ``Int8Params``; anything else is returned as it is.
        state: of an 8-bit layer, where its scales are once it has run.

    Raises:
        UnsupportedError: an 8-bit weight without scales.
    """
    kind = get_bnb_param_type(weight)
    if not kind:
        return weight
    import bitsandbytes as bnb

    if kind == "4bit":
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[attr-defined]
    scales = getattr(weight, "SCB", None)
    if scales is None:
        scales = getattr(state, "SCB", None)
    if scales is None:
        raise UnsupportedError("an 8-bit weight without its scales (SCB) cannot be dequantised; move the layer first")
    return bnb.functional.int8_vectorwise_dequant(weight.data, scales)


def get_layer_device_map(model: Any) -> dict[int, int | str] | None:
    """Return the device of each numbered block of a model that is spread over devices, None for any other."""
    spread = getattr(model, "hf_device_map", None)
    if not spread:
        return None
    if set(spread) == {""}:
        return None
    found: dict[int, int | str] = {}
    main = next((device for device in spread.values() if device not in ("cpu", "disk")), None)
    if main is not None:  # what is offloaded runs on the main device
        spread = {name: main if device in ("cpu", "disk") else device for name, device in spread.items()}
    for name, device in spread.items():
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if number is not None:
            found[number] = device
    return found


def map_cache_to_layer_device_map(model: Any, cache: Any) -> None:
    """Move each block's keys and values to the block's device, in place."""
    devices = get_layer_device_map(model)
    if devices is None:
        return
    if hasattr(cache, "self_attention_cache"):  # encoder and decoder
        map_cache_to_layer_device_map(model, cache.self_attention_cache)
        return
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if number in devices and getattr(layer, "keys", None) is not None:
            layer.keys = layer.keys.to(devices[number])
            layer.values = layer.values.to(devices[number])


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Put every parameter that is registered inside the block on the meta device.

    Args:
        include_buffers: buffers too.
    """
    if include_buffers:
        with torch.device("meta"), _on_meta():
            yield
        return
    with _on_meta():
        yield


@contextmanager
def _on_meta() -> Iterator[None]:
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(module, name, param)
        held = module._parameters[name]
        if held is not None:
            cls: Any = type(held)
            kept = {key: value for key, value in held.__dict__.items() if key != "requires_grad"}
            module._parameters[name] = cls(held.to("meta"), requires_grad=held.requires_grad, **kept)

    register_empty.plain = register  # type: ignore[attr-defined]
    nn.Module.register_parameter = register_empty  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def skip_init_on_device(func: F) -> F:
    """Let a function make real tensors although it is called inside :func:`init_empty_weights`."""

    @functools.wraps(func)
    def run(*args: Any, **kwargs: Any) -> Any:
        here = nn.Module.register_parameter
        nn.Module.register_parameter = getattr(here, "plain", here)  # type: ignore[method-assign]
        try:
            return func(*args, **kwargs)
        finally:
            nn.Module.register_parameter = here  # type: ignore[method-assign]

    return run  # type: ignore[return-value]
