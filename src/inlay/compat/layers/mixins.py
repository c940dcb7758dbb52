"""The mixin that users inherit from when they write a layer of a known method: its dicts, and tensors to fill them."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import nn

from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.layers.making import bound, kind_and_site, method_for, own_config, widths
from inlay.compat.layers.table import Recorded
from inlay.compat.layers.viewing import Own
from inlay.core import storage
from inlay.core.dtype import merge_dtype
from inlay.core.entry import find_tensor
from inlay.core.hanging import hang
from inlay.core.initial import derives
from inlay.core.kind import Holder
from inlay.core.layer import AdaptedLayer
from inlay.core.method import P
from inlay.core.slot import Slot
from inlay.errors import UnsupportedError
from inlay.kinds.linear import Linear

__all__ = ["MODULE_DICTS", "TensorLayer", "begin_at", "holder_of", "refill"]

# names of PEFT's that hold modules by adapter name; the others hold parameters
MODULE_DICTS = {
    *("lora_A", "lora_B", "lora_magnitude_vector", "oft_R", "oft_embedding_R", "ln_tuning_layers", "psoft_R"),
    *("peanut_A", "peanut_B", "peanut_encoders", "peanut_decoders"),
    *(f"glora_{part}" for part in "ABCDE"),
    *(f"{method}_dropout" for method in ("lora", "vera", "oft", "boft", "hira", "deft", "psoft")),
}


def holder_of(name: str, weight: bool) -> Any:
    """Return an empty container of the kind that PEFT has under a name."""
    if name in MODULE_DICTS:
        return nn.ModuleDict()
    return nn.ParameterDict() if weight else {}


class TensorLayer(BaseTunerLayer):
    """Base of the mixins of all methods (``LoraLayer``, ``IA3Layer``, ...). Subclasses say which in ``_recorded``."""

    _recorded: Any = None
    kwargs: Any = Own(dict)
    _taken: Any = Own(dict)  # adapter name -> (method, site), of layers that users write

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        entry: Recorded = self._recorded
        mixin = next(one for one in entry.above if one.weights)
        given = bound(mixin.init_signature, (base_layer, *args), kwargs)
        if isinstance(self, nn.Module) and "_modules" not in self.__dict__:
            nn.Module.__init__(self)
        for name in mixin.init_signature.parameters:
            if name in given:
                setattr(self, name, given[name])
        self.kwargs = kwargs
        for name in entry.weights:
            setattr(self, name, holder_of(name, True))
        for name in entry.others:
            setattr(self, name, holder_of(name, False))
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True
        self.in_features, self.out_features = widths(self.get_base_layer())

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Give this layer an adapter's tensors and numbers, as the method's slots say.

        Raises:
            ConfigError: a number is not allowed.
            UnsupportedError: the method refuses the base layer.
        """
        entry: Recorded = self._recorded
        given = bound(entry.update_signature, (adapter_name, *args), kwargs)
        config = own_config(given["config"], given)
        method = method_for(entry.peft_type, entry.name, config)(config)
        base = self.get_base_layer()
        kind, site = kind_and_site(self, base)
        slots = method.slots(site)
        p = P()
        for name, value in method.options(site).items():
            setattr(p, name, value)
        for role, slot in slots.items():
            hang(self, adapter_name, slot, _filled(slot), partial(_leaf, kind, site, slot))  # type: ignore[arg-type]
            setattr(p, role, find_tensor(self, adapter_name, *slot.place))  # type: ignore[arg-type]
        if (method.needs_base or derives(method)) and kind is not None:
            with torch.no_grad():
                method.derive(site, p, _wide(kind, base, site))
                _prepared(kind, base, site, method, p)
        self._taken[adapter_name] = (method, site)
        self._note(adapter_name, method.options(site), config, method.dropout_field)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _note(self, adapter: str, options: dict[str, Any], config: Any, dropout: str | None) -> None:
        """Write an adapter's numbers into the dicts that hold them."""
        for name in self._recorded.others:
            if name in options:
                getattr(self, name)[adapter] = options[name]
            elif name == dropout:
                p = float(getattr(config, name))
                getattr(self, name)[adapter] = nn.Dropout(p) if p > 0.0 else nn.Identity()
            elif hasattr(config, name):
                getattr(self, name)[adapter] = getattr(config, name)


@torch.no_grad()
def begin_at(layer: Any, adapter: str, method: Any, site: Any) -> None:
    """Give an adapter's tensors at a user's layer the values with which ``method`` starts."""
    base = layer.get_base_layer()
    kind, _ = kind_and_site(layer, base)
    if kind is None:
        raise UnsupportedError(f"{type(base).__name__} is no layer whose weight can be read")
    p = P()
    for name, value in method.options(site).items():
        setattr(p, name, value)
    for role, slot in method.slots(site).items():
        setattr(p, role, find_tensor(layer, adapter, *slot.place))
    _prepared(kind, base, site, method, p)


def _prepared(kind: Any, base: Any, site: Any, method: Any, p: P) -> None:
    """Let a method set initial values, and write the base that it asks for."""
    notes = {name: vars(base)[name] for name in method.measured if name in vars(base)}
    p.measured = notes
    rebased = method.prepare(site, p, _wide(kind, base, site))
    for name, tensor in {} if rebased is None else kind.stored(base, site, rebased).items():
        storage.write(base, name, tensor)
    for name in notes:
        delattr(base, name)


def _wide(kind: Any, base: Any, site: Any) -> Any:
    present = kind.read(base, site)
    return present.to(merge_dtype(present.weight.dtype))


@torch.no_grad()
def refill(layer: Any, adapter: str, **fields: Any) -> None:
    """Give an adapter's tensors fresh initial values, with other values for some fields of its config.

    Args:
        layer: the engine's or a user's.
        adapter: its name; nothing happens where the layer does not have it.
        fields: what differs from the config.
    """
    if isinstance(layer, AdaptedLayer):
        held = [(entry.method, entry.site) for entry in layer._each([adapter])]
    else:
        held = [layer._taken[adapter]] if adapter in layer._taken else []
    for method, site in held:
        fresh = type(method)(dataclasses.replace(method.config, **fields))
        for slot in fresh.slots(site).values():
            if not slot.buffer:
                tensor = find_tensor(layer, adapter, *slot.place)
                tensor.copy_(_filled(slot))


def _filled(slot: Slot) -> torch.Tensor:
    tensor = torch.empty(slot.shape, dtype=slot.dtype or torch.float32)
    with torch.no_grad():
        slot.init(tensor, torch.default_generator)
    return tensor


def _leaf(kind: Any, site: Any, slot: Slot) -> nn.Module:
    return (kind or Linear()).leaf(site, slot) if slot.leaf else Holder()
