"""What a model's adapters are doing, layer by layer and as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from inlay.config.types import method_name
from inlay.core import storage
from inlay.core.call import call_of
from inlay.core.follow import Follower, follower_of
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.core.state import find_state
from inlay.errors import UnsupportedError
from inlay.models.counting import count

__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]

Irregular = Literal["irregular"]
V = TypeVar("V")


@dataclass
class TunerLayerStatus:
    """One adapted layer.

    Attributes:
        name: its path below the module that was asked.
        module_type: method and layer class, such as ``lora.Linear``.
        enabled: whether its adapters are switched on.
        active_adapters, merged_adapters: in order, whether or not the layer has them; of a module that adapters copy
            in full, those that have a copy.
        requires_grad: by adapter; ``"irregular"`` where its tensors differ.
        available_adapters: those that the layer has, sorted.
        devices: by adapter.
        quantization_backend: how the base weight is held, None if plainly.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """All adapted layers of a model; ``"irregular"`` where they do not agree.

    Active and merged adapters are those of the adapted layers; modules that adapters copy in full do not count.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]] = field(default_factory=dict)
    quantization_backend: str | list[str] | None = None


def layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """Return the status of each adapted layer of a model, bare or wrapped.

    Raises:
        UnsupportedError: the model has no adapted layer.
    """
    state = find_state(model)
    call = None if state is None else call_of(state)
    prefix = "base_model." if hasattr(model, "base_model") and "base_model" in model._modules else ""
    found = []
    for path, module in model.named_modules():
        follower = follower_of(module)
        if follower is None:
            continue
        tensors = _tensors(follower)
        found.append(
            TunerLayerStatus(
                name=path.removeprefix(prefix),
                module_type=_module_type(follower),
                enabled=follower.enabled and not (call is not None and call.disabled),
                active_adapters=follower.active_adapters,
                merged_adapters=list(follower.merged_names),
                requires_grad={name: _common(t.requires_grad for t in held) for name, held in tensors.items()},
                available_adapters=sorted(tensors),
                devices={name: sorted({t.device.type for t in held}) for name, held in tensors.items()},
                quantization_backend=_backend(follower),
            )
        )
    if not found:
        raise UnsupportedError(f"this {type(model).__name__} has no adapted layers, so there is no status to report")
    return found


def model_status(model: nn.Module) -> TunerModelStatus:
    """Return the status of a model, bare or wrapped.

    Raises:
        UnsupportedError: the model has no adapted layer.
    """
    layers = layer_status(model)
    state = find_state(model)
    assert state is not None
    tuner = model._modules.get("base_model")
    wrapped = tuner is not None and "_state" in tuner.__dict__
    base: Any = tuner.model if wrapped else model  # type: ignore[union-attr]
    adapted = [layer for layer in layers if layer.module_type != _COPIES]
    trainable, total = count(base)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    return TunerModelStatus(
        base_model_type=type(base).__name__,
        adapter_model_type=type(tuner).__name__ if wrapped else "None",
        peft_types={
            name: str(getattr(r.config.peft_type, "value", r.config.peft_type)) for name, r in state.records.items()
        },
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in adapted or layers),
        merged_adapters=_common(layer.merged_adapters for layer in adapted or layers),
        requires_grad={
            name: _common(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in names
        },
        available_adapters=names,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in names
        },
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


get_layer_status = layer_status
get_model_status = model_status

_COPIES = "ModulesToSaveWrapper"


def _common(values: Iterable[V]) -> V | Irregular:
    """Return what all values are, or ``"irregular"``."""
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else "irregular"


def _tensors(follower: Follower) -> dict[str, list[Tensor]]:
    """Return the parameters (buffers where there are none) by adapter, in the order of adding."""
    found: dict[str, list[Tensor]] = {}
    for name in follower.adapters_here():
        held = follower.tensors_of(name)
        parameters: list[Tensor] = [tensor for tensor in held if isinstance(tensor, nn.Parameter)]
        found[name] = parameters or held
    return found


def _module_type(follower: Follower) -> str:
    """Return the layer's type as PEFT would print it for a method with a layer class of the base layer's name."""
    if isinstance(follower, ModuleCopies):
        return _COPIES
    if not isinstance(follower, AdaptedLayer):
        return follower.type_name
    entries = next(iter(follower.entries.values()), ())
    base = type(follower.get_base_layer()).__name__
    layer = "Linear" if base == "Conv1D" else base
    return f"{method_name(entries[0].method.config.peft_type).lower()}.{layer}" if entries else layer


def _backend(follower: Follower) -> str | None:
    if not isinstance(follower, AdaptedLayer):
        return None
    name = storage.storage_of(follower.leaf_layer).name
    return None if name == storage.PLAIN.name else name
