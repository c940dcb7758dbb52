"""``BaseTunerLayer``: what PEFT's users ask layers for, and inherit from when they write their own.

Every layer that the engine adapts is an instance. A layer that a user writes keeps its tensors in dicts by adapter name
(named in ``adapter_layer_names``) and its own forward pass; this class gives it the rest. Once it is part of a model
with adapters it follows that model's state, see :meth:`BaseTunerLayer.follow_state`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.compat.layers.viewing import LayerView, Own, listed, require_grad
from inlay.core import storage
from inlay.core.call import call_in_force
from inlay.core.layer import AdaptedLayer
from inlay.core.state import State
from inlay.errors import InlayWarning

__all__ = ["BaseTunerLayer"]


class BaseTunerLayer(metaclass=LayerView):
    """Mixed into a module that has ``base_layer`` and dicts of tensors or modules by adapter name.

    Class attributes:
        adapter_layer_names: names of the attributes that hold weights by adapter name; dotted for nested ones.
        other_param_names: names of the attributes that hold anything else by adapter name.
        frozen_peft_weight_names: adapter name -> those of ``adapter_layer_names`` that never train for it.
        quantization_backend: reads and writes a quantised base weight; None for a plain one.
    """

    adapter_layer_names: Any = ()
    other_param_names: Any = ()
    frozen_peft_weight_names: Any = Own(dict)
    quantization_backend: Any = None
    merged_adapters: Any = Own(list)
    _disable_adapters: Any = False
    _active_adapter: Any = "default"
    cast_input_dtype_enabled: bool = True

    # -- the base layer -----------------------------------------------------------------------------------------------

    def get_base_layer(self) -> Any:
        """Return the untouched layer, below every layer that wraps it."""
        layer: Any = self
        while hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, or its packed weight where it is quantised that way."""
        base: Any = self.get_base_layer()
        packed: Tensor | None = getattr(base, "qweight", None)
        return base.weight if packed is None else packed

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.get_base_layer().bias

    def get_base_weight(self) -> Tensor:
        """Return the base weight as plain numbers, in its stored shape, without gradient."""
        if self.quantization_backend is not None:
            weight: Tensor = self.quantization_backend.get_base_weight(self.get_base_layer())
            return weight
        return storage.read(self.get_base_layer(), "weight").detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Put other numbers, of the stored shape, in the place of the base weight."""
        if self.quantization_backend is not None:
            self.quantization_backend.set_base_weight(self, weight_data)
        else:
            self.get_base_layer().weight.data = weight_data

    def _get_embed_scale(self) -> Tensor | None:
        """Return what an embedding multiplies its rows by, as one number; None where it does nothing of the kind."""
        base: Any = self.get_base_layer()
        scale = getattr(base, "embed_scale", None)
        if isinstance(scale, (int, float)):
            return torch.tensor(scale, device=base.weight.device, dtype=base.weight.dtype)
        if not isinstance(scale, Tensor):
            return None
        if scale.numel() != 1:
            warnings.warn(
                f"embed_scale of {type(base).__name__} has shape {tuple(scale.shape)}; only a single number can be "
                "applied to an adapter's rows, so they are not scaled",
                InlayWarning,
                stacklevel=2,
            )
            return None
        return scale

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device | None, torch.dtype | None]:
        """Return where a layer's weight lives and what it computes in, as far as it says."""
        held = [getattr(base_layer, name, None) for name in ("weight", "qweight")]
        weight = next((tensor for tensor in held if tensor is not None), None)
        dtype = getattr(base_layer, "compute_dtype", None if weight is None else weight.dtype)
        return (None if weight is None else weight.device), dtype

    def _cast_input_dtype(self, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Cast an input to ``dtype``, unless ``cast_input_dtype_enabled`` of this layer is False."""
        if x is None or x.dtype == dtype or not self.cast_input_dtype_enabled:
            return x
        return x.to(dtype)

    # -- the model it is part of --------------------------------------------------------------------------------------

    def follow_state(self, state: State | None) -> None:
        """Follow a model's state: its switch, calls that are in force, and which adapters a recomputed block had.

        What is active otherwise is set through :meth:`set_adapter`, which a user's layer may override.
        """
        if state is None:
            self.__dict__.pop("_state", None)
        else:
            self.__dict__["_state"] = state

    def _call(self) -> Any:
        state = self.__dict__.get("_state")
        return None if state is None else call_in_force(state, bool(getattr(self, "training", False)))

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are off here: on this layer, in its model, or for the call that is running."""
        state: State | None = self.__dict__.get("_state")
        if self._disable_adapters or (state is not None and not state.enabled):
            return True
        call = self._call()
        return call is not None and call.disabled

    @property
    def active_adapter(self) -> Any:
        """What was activated last: a name or a list of names."""
        call = self._call()
        return self._active_adapter if call is None or call.active is None else list(call.active)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters, in activation order."""
        return listed(self.active_adapter)

    # -- adapters -----------------------------------------------------------------------------------------------------

    def _held(self) -> Iterator[tuple[str, Any]]:
        """Iterate over the dicts of weights, with the name of each."""
        for path in self.adapter_layer_names:
            holder: Any = self
            for part in path.split("."):
                holder = getattr(holder, part)
            yield path, holder

    def _get_available_adapters(self) -> set[str]:
        """Return the names of the adapters that have weights here."""
        dicts = (nn.ModuleDict, nn.ParameterDict)
        return {name for _, held in self._held() if isinstance(held, dicts) for name in held.keys()}  # noqa: SIM118

    def _all_available_adapter_names(self) -> list[str]:
        """Return the sorted names of the adapters that have anything here."""
        held = [getattr(self, name) for name in (*self.adapter_layer_names, *self.other_param_names)]
        return sorted({name for values in held if hasattr(values, "keys") for name in values.keys()})  # noqa: SIM118

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters, in this order; they train and the others do not, unless ``inference_mode``."""
        names = listed(adapter_names)
        for _, held in self._held():
            for name, value in held.items():
                require_grad(value, name in names and not inference_mode)
        self._freeze_non_trainable_peft_weights(names)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Switch this layer's adapters on, where the active ones train again, or off, where nothing does."""
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            for _, held in self._held():
                for value in held.values():
                    require_grad(value, False)
        self._disable_adapters = not enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters on or off, whether they are active or not."""
        names = listed(adapter_names)
        for _, held in self._held():
            for name in names:
                if name in held:
                    require_grad(held[name], requires_grad)
        if requires_grad:
            self._freeze_non_trainable_peft_weights(names)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Freeze again what ``frozen_peft_weight_names`` says never trains."""
        frozen = self.frozen_peft_weight_names
        for name in frozen if adapter_names is None else listed(adapter_names):
            for path, held in self._held():
                if path in frozen.get(name, ()) and name in held:
                    require_grad(held[name], False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop what an adapter has here. If nothing else is active then, the first of those left is activated."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            held = getattr(self, attribute)
            if adapter_name in held:
                del held[adapter_name]
        if adapter_name in self.frozen_peft_weight_names:
            del self.frozen_peft_weight_names[adapter_name]
        if adapter_name not in self.active_adapters:
            return
        left = [name for name in self.active_adapters if name != adapter_name]
        remaining = self._all_available_adapter_names()
        if not left and remaining:
            warnings.warn(
                f"adapter {adapter_name!r} was active and is deleted; {remaining[0]!r} is activated in its place",
                InlayWarning,
                stacklevel=2,
            )
        self.set_adapter(left or remaining[:1])

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move an adapter's weights to the base layer's device, or to ``device``, and to its floating dtype."""
        base = self.get_base_layer()
        at, dtype = self._get_base_layer_device_and_dtype(getattr(base, "out_proj", base))
        device = at if device is None else device
        if device is None:
            return
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            dtype = None
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            held: Any = getattr(self, attribute, None)
            if not isinstance(held, (nn.ModuleDict, nn.ParameterDict)) or adapter_name not in held:
                continue
            if any(parameter.is_meta for parameter in held.parameters()):
                continue  # a load is still to fill it
            value: Any = held[adapter_name]
            if isinstance(value, nn.Module):
                value.to(device, dtype=dtype)
                continue
            wanted = dtype if value.is_floating_point() else None
            if isinstance(value, nn.Parameter):  # stays the same object, which an optimiser may hold
                value.data = value.data.to(device, dtype=wanted)
            else:
                held[adapter_name] = value.to(device, dtype=wanted)

    # -- merging ------------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base layer."""
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its adapters are merged (merge)")

    def unmerge(self) -> None:
        """Take merged adapters out of the base weight again."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its adapters are unmerged (unmerge)")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter adds a matrix that LoRA could approximate."""
        return False


BaseTunerLayer.register(AdaptedLayer)
