"""What PEFT's users and integrations call on one layer; all of it writes through to state and entries."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core import storage
from inlay.core.call import call_of
from inlay.core.entry import MergedNames
from inlay.core.holder import EntryHolder
from inlay.errors import InlayWarning, MergeError, UnknownAdapterError, UnsupportedError, did_you_mean

if TYPE_CHECKING:
    from inlay.core.affine import Affine
    from inlay.core.entry import Entry
    from inlay.core.kind import Kind
    from inlay.core.method import Method, P

__all__ = ["LayerSurface", "attribute_sources"]

# Asked in turn for an attribute that neither a layer nor what it stands for has: (layer, name) -> value or
# NotImplemented. A namespace that gives layers further names of its own adds itself here.
attribute_sources: list[Callable[[Any, str], Any]] = []


class LayerSurface(EntryHolder):
    """Mixed into the adapted layer, which has ``entries``."""

    # what reads and writes a quantised base weight for PEFT's own layers; here the storages do it
    quantization_backend: Any = None
    # False lets products run in the dtype of the input, whatever the policy says
    cast_input_dtype_enabled: bool = True

    if TYPE_CHECKING:
        kind: Kind
        _merged: tuple[str, ...]

        @property
        def leaf_layer(self) -> nn.Module: ...

        def params(self, entry: Entry, whole: bool = False) -> P: ...
        def base_affine(self, whole: bool = False) -> Affine: ...

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters merged into the base layer, in the order of merging."""
        return MergedNames(self)

    @merged_adapters.setter
    def merged_adapters(self, names: Iterable[str]) -> None:
        self.__dict__["_merged"] = tuple(names)
        self.state.roster += 1
        self.state.touch()

    @property
    def compute(self) -> str:
        """In which dtype adapter products run here; see ``Policy.compute``."""
        return self.state.policy.compute if self.cast_input_dtype_enabled else "base"

    @property
    def merged(self) -> bool:
        return bool(self._merged)

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are off here, also for the call that is running only."""
        call = call_of(self.state)
        return not self.enabled or (call is not None and call.disabled)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list if it is not exactly one; PEFT's policy always has a list."""
        return list(self.active) if self.state.policy.peft_layers else super().active_adapter

    @property
    def _active_adapter(self) -> str | list[str]:
        return self.active_adapter

    @_active_adapter.setter
    def _active_adapter(self, names: str | Iterable[str]) -> None:
        self.override(active=(names,) if isinstance(names, str) else tuple(names))

    @property
    def _disable_adapters(self) -> bool:
        return self.disable_adapters

    @_disable_adapters.setter
    def _disable_adapters(self, disabled: bool) -> None:
        self.override(enabled=not disabled)

    @property
    def adapter_layer_names(self) -> tuple[str, ...]:
        """Names of the attributes that hold weights by adapter name; dotted for nested ones."""
        named = (".".join(path) for entry in self._each() for role, path, _ in entry.places if role in entry.weights)
        return tuple(dict.fromkeys(named))

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """Names of the attributes that hold anything else by adapter name."""
        names: list[str] = []
        for entry in self._each():
            names += entry.options
            names += [".".join(path) for role, path, _ in entry.places if role not in entry.weights]
            names += entry.method.shown
            if entry.method.dropout_field is not None:
                names.append(entry.method.dropout_field)
        return tuple(dict.fromkeys(names))

    def _further(self, name: str) -> Any:
        """Return an attribute that neither this layer nor its base layer has, or NotImplemented.

        It may be a config field by adapter name, a container of shared tensors, or what ``attribute_sources`` know.
        """
        showing = [entry for entry in self._each() if name in entry.method.shown]
        if showing:
            return MappingProxyType({entry.name: getattr(entry.method.config, name) for entry in showing})
        if any(path[0] == name for entry in self._each() for _, path, _ in entry.shared):
            return self.state.shared._modules[name]
        found = (source(self, name) for source in attribute_sources)
        return next((value for value in found if value is not NotImplemented), NotImplemented)

    def _get_available_adapters(self) -> set[str]:
        """Return the names of the adapters that have weights here."""
        return {entry.name for entry in self._each() if entry.weights}

    def _all_available_adapter_names(self) -> list[str]:
        """Return the sorted names of the adapters that have anything here."""
        return sorted(self.entries)

    @cached_property
    def in_features(self) -> int:
        """Input features or channels of the base layer."""
        return int(getattr(self.base_layer, "in_features", self.site.all_channels))

    @cached_property
    def out_features(self) -> int:
        """Output features or channels of the base layer."""
        return int(getattr(self.base_layer, "out_features", self.site.out))

    @cached_property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as (in, out)."""
        return self.site.transposed and self.site.parameter is None and not self.site.kernel

    def get_base_weight(self) -> Tensor:
        """Return the base layer's weight as it stands, as plain numbers in its stored shape, without gradient."""
        return storage.read(self.leaf_layer, self.kind.weight_name).detach()

    @torch.no_grad()
    def set_base_weight(self, weight_data: Tensor) -> None:
        """Write other numbers, of the stored shape, into the base layer's weight."""
        storage.write(self.leaf_layer, self.kind.weight_name, weight_data)

    def get_delta_weight(self, adapter: str = "", *, adapter_name: str = "") -> Tensor:
        """Return what an adapter adds to the weight, with its scaling, in the weight's stored shape.

        A method that multiplies the weight gives the matrix it multiplies with. PEFT has either name for the argument.

        Raises:
            UnknownAdapterError: it has nothing here.
            UnsupportedError: the method has no such matrix, or the layer's weight cannot hold it.
        """
        adapter = adapter or adapter_name
        entries = self.entries.get(adapter, ())
        if not entries:
            known = ", ".join(map(repr, self.entries)) or "none"
            raise UnknownAdapterError(
                f"{self.site.name!r} has no adapter {adapter!r}; it has: {known}.{did_you_mean(adapter, self.entries)}"
            )
        return entries[0].method.delta_weight(entries[0].site, self.params(entries[0]), self.base_affine())

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter only adds a matrix to the weight of a linear layer, which LoRA could approximate."""
        entries = self.entries.get(adapter_name, ()) if self.kind.name == "linear" else ()
        return bool(entries) and all(entry.method.commutes and entry.method.mergeable for entry in entries)

    def get_base_layer(self) -> nn.Module:
        """Return the untouched layer."""
        base: Any = self._modules["base_layer"]
        while isinstance(base, LayerSurface):
            base = base._modules["base_layer"]
        return base

    def set_adapter(self, adapter_names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Activate adapters on this layer only, in this order; it no longer follows the model.

        Args:
            adapter_names: name or names.
            inference_mode: leave gradients alone (under PEFT's policy nothing trains then). Otherwise the activated
                ones train here and the others do not.

        Raises:
            UnknownAdapterError: the model has no such adapter. PEFT's policy lets that pass.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        if not self.state.policy.peft_layers:
            for name in names:
                self.state.record(name)
        self.override(active=names)
        if not inference_mode or self.state.policy.peft_layers:
            self.set_requires_grad([name for name in self.entries if inference_mode or name not in names], False)
        if not inference_mode:
            self.set_requires_grad(names)

    def train_adapter(self, adapter: str, trainable: bool) -> None:
        for entry in self.__dict__["entries"].get(adapter, ()):
            entry.train(self, trainable)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Switch gradients of adapters on or off on this layer, whether they are active or not."""
        for entry in self._each([adapter_names] if isinstance(adapter_names, str) else adapter_names):
            entry.train(self, requires_grad)
            if requires_grad:
                self.state.training.add(entry.name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch every adapter of this layer on or off; it no longer follows the model's switch."""
        self.override(enabled=enabled)

    def receive(self, adapter_name: str, method: Method, mount: Callable[[], None]) -> None:
        """Take in a new adapter, whose tensors ``mount`` hangs below this layer; a subclass may do more."""
        mount()

    def delete_adapter(self, adapter_name: str, new_active_adapters: Iterable[str] | None = None) -> None:
        """Drop what an adapter has on this layer; elsewhere it stays.

        Args:
            adapter_name: its name.
            new_active_adapters: what is active here then, if it was active. By default those that were beside it, and
                if it was alone, the first of those left, with a warning.

        Raises:
            MergeError: it is merged here.
        """
        from inlay.core.hanging import dismount, forget_unused

        if adapter_name in self._merged:
            raise MergeError(f"adapter {adapter_name!r} is merged into this layer; unmerge it before deleting it")
        dismount(self, adapter_name)
        record = self.state.records.get(adapter_name)
        if record is not None:
            record.reach = None  # which would keep its tensors alive
        self.state.touch()
        if adapter_name in self.active:
            wanted = self.active if new_active_adapters is None else new_active_adapters
            left = [name for name in wanted if name != adapter_name]
            if not left and self.entries and new_active_adapters is None:
                left = sorted(self.entries)[:1]
                warnings.warn(
                    f"{self.site.name!r}: {adapter_name!r} was active and was deleted; {left[0]!r} is active now",
                    InlayWarning,
                    stacklevel=2,
                )
            self.set_adapter(left)
        forget_unused(self.state, adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into this layer only, by default the active ones; always checked for finiteness."""
        from inlay.core.merge import merge_layers

        merge_layers([self], list(self.active) if adapter_names is None else adapter_names)  # type: ignore[list-item]

    def unmerge(self) -> None:
        """Put this layer's original weight back, bitwise."""
        self.restore()

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scaling here to ``scale`` times what its config says."""
        self._rescale([adapter], lambda entry: float(entry.method.options(entry.site)["scaling"]) * scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters here."""
        self._rescale(self.active, lambda entry: entry.options["scaling"] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters here, or without ``scale`` put back what their configs say."""
        if scale is None:
            self._rescale(self.active, lambda entry: entry.method.options(entry.site)["scaling"])
        else:
            self._rescale(self.active, lambda entry: entry.options["scaling"] / scale)

    def _rescale(self, names: Iterable[str], scaling: Callable[[Entry], Any]) -> None:
        entries = list(self._each(names))
        scaled = [entry for entry in entries if "scaling" in entry.options]
        if entries and not scaled:
            raise UnsupportedError(
                f"adapter {entries[0].name!r} ({type(entries[0].method).__name__}) has no scaling to change"
            )
        for entry in scaled:
            entry.set("scaling", scaling(entry))
        self.state.touch()
