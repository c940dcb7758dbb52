"""The one module that stands where an adapted layer stood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.core import storage
from inlay.core.affine import Affine, Site
from inlay.core.call import Call, call_in_force
from inlay.core.chain import ChainHolder
from inlay.core.dtype import merge_dtype
from inlay.core.entry import Entry, OptionView, find_tensor
from inlay.core.fused import run_chain
from inlay.core.hanging import hung_dropouts
from inlay.core.inner import Inner
from inlay.core.kind import Kind
from inlay.core.method import P
from inlay.core.mixed import run_routed
from inlay.core.state import State
from inlay.errors import StateError
from inlay.parallel.tensors import gather, is_distributed, replicate, scatter

__all__ = ["AdaptedLayer"]


class AdaptedLayer(ChainHolder):
    """A layer with adapters: the untouched layer as ``base_layer``, and a chain of methods over it.

    Attributes that it does not have are the base layer's, so ``weight``, ``bias`` or ``in_features`` can be read.
    """

    base_layer: nn.Module
    shares: tuple[str, ...]

    def __init__(self, base: nn.Module, kind: Kind, site: Site, state: State) -> None:
        super().__init__()
        own = self.__dict__
        own["kind"] = kind
        own["site"] = site
        own["entries"] = {}
        own["_kept"] = {}  # base tensors as they were before merging
        own["shares"] = ()  # paths of other layers that hold the same weight
        own["_bank"] = None  # what compiled code runs, where the model was prepared for that; see ``core.fixed``
        own["_modules"]["base_layer"] = base
        own["training"] = base.training
        self.join(state)

    # -- attributes ---------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        entries = self.__dict__.get("entries")
        if entries is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        if not name.startswith("_"):
            for held in entries.values():
                for entry in held:
                    if name in entry.options:
                        return OptionView(self, name)
                    if name == entry.method.dropout_field:
                        return hung_dropouts(self, name)
            base = self.__dict__["_modules"].get("base_layer")
            found = NotImplemented if base is None else getattr(base, name, NotImplemented)
            if found is not NotImplemented:
                return found
        found = self._further(name)
        if found is NotImplemented:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}, and neither has its base layer")
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bank = self._bank
        if bank is not None:
            bank.release()
            bank.move(fn)
        super()._apply(fn, recurse)
        if bank is not None and self.state.fixed is not None:
            self.state.fixed.place(self)
        for entries in self.entries.values():
            for entry in entries:
                for option, value in entry.options.items():
                    if isinstance(value, Tensor):  # a scale, which follows the layer's device and keeps its precision
                        device = fn(value).device
                        if device.type != "meta":
                            entry.options[option] = value.to(device)
        return self

    @property
    def leaf_layer(self) -> nn.Module:
        """The module whose tensors are the layer's map."""
        return self._modules["base_layer"]  # type: ignore[return-value]

    # -- tensors ------------------------------------------------------------------------------------------------------

    def params(self, entry: Entry, whole: bool = False) -> P:
        """Return an entry's tensors by role, with its numbers; ``whole`` gathers them from every process."""
        home = entry.home if entry.home is not None else self
        dropout = None
        if entry.method.dropout_field is not None:
            held = home._modules.get(entry.method.dropout_field)
            if held is not None:
                dropout = held._modules.get(entry.name)
        p = P(dropout)
        p.training = self.training
        for option, value in entry.options.items():
            if option not in entry.method.unread:
                setattr(p, option, value)
        for role, containers, leaf in entry.places:
            tensor = find_tensor(home, entry.name, containers, leaf)
            setattr(p, role, gather(tensor) if whole else tensor)
        for role, containers, leaf in entry.shared:
            tensor = find_tensor(self.state.shared, entry.name, containers, leaf)
            if whole:
                tensor = gather(tensor)
            elif entry.mesh is not None:
                tensor = replicate(tensor, entry.mesh)
            setattr(p, role, tensor)
        return p

    @torch.no_grad()
    def put(self, entry: Entry, p: P) -> None:
        """Write whole tensors of an entry back to where :meth:`params` gathered them from."""
        home = entry.home if entry.home is not None else self
        for role, containers, leaf in entry.places:
            tensor = find_tensor(home, entry.name, containers, leaf)
            if is_distributed(tensor):
                tensor.copy_(scatter(getattr(p, role), tensor))

    def present_affine(self, whole: bool = False) -> Affine:
        """The map of the base layer as it stands, with what is merged into it; ``whole`` gathers it."""
        leaf = self.leaf_layer
        if torch.compiler.is_compiling():  # no storage moves tensors inside a graph, and older dynamo traces no guard
            present = self.kind.read(leaf, self.site)
        else:
            with storage.onloaded(leaf):
                present = self.kind.read(leaf, self.site)
        if not whole:
            return present
        return Affine(gather(present.weight), None if present.bias is None else gather(present.bias))

    def base_affine(self, whole: bool = False) -> Affine:
        """The map of the untouched layer, also while something is merged; ``whole`` gathers it."""
        present = self.present_affine(whole)
        if not self._merged:
            return present
        kept = self._kept
        if not kept:
            raise StateError(
                f"{self.site.name!r}: the untouched weight is needed and was not kept when adapters were merged; "
                "merge with keep='copy'"
            )
        device = present.weight.device
        tensors = {name: tensor.to(device) for name, tensor in kept.items()}
        if not is_distributed(present.weight):  # FSDP2 has the present weight gathered, or the caller wants it whole
            tensors = {name: gather(tensor) for name, tensor in tensors.items()}
        bias = tensors.get(self.kind.bias_name, present.bias)
        return self.kind.view(self.leaf_layer, self.site, tensors[self.kind.weight_name], bias)

    def fold(self, chain: tuple[Entry, ...], dtype: torch.dtype | None = None, whole: bool = False) -> Affine:
        """Return the map with the entries of ``chain`` written into it, in weight space.

        ``dtype`` raises the base first, so that a merge rounds once; ``whole`` gathers every tensor from every process.
        """
        layer = self.present_affine(whole)
        reads_base = not all(entry.method.additive for entry in chain)
        base = self.base_affine(whole) if self._merged and reads_base else layer
        if dtype is not None:
            same = layer is base
            layer = layer.to(dtype)
            base = layer if same else base.to(dtype)
        for entry in chain:
            layer = entry.method.rewrite(entry.site, self.params(entry, whole), layer, base)
        return layer

    def merged_tensors(self, chain: tuple[Entry, ...]) -> dict[str, Tensor]:
        """Return what merging ``chain`` would store, by parameter name, not yet rounded to the stored dtype."""
        leaf = self.leaf_layer
        weight = self.kind.weight_dtype(leaf)
        with torch.no_grad():
            folded = self.fold(chain, merge_dtype(weight or torch.float32), whole=True)
        return self.kind.stored(leaf, self.site, folded)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if "adapter_names" in kwargs:
            return self.called_by_name(args, kwargs)
        call = call_in_force(self.state, self.training)
        if call is not None:
            if call.disabled:
                return self._run((), args, kwargs, off=True)
            if call.names is not None and self.enabled:
                return self._routed(call, args, kwargs)
        return self._run(self.chain(call), args, kwargs, off=not self.enabled)

    def _run(self, chain: tuple[Entry, ...], args: tuple[Any, ...], kwargs: dict[str, Any], off: bool = False) -> Any:
        """Run the layer with a chain over it; ``off`` also hides what is merged."""
        if off and self._merged:
            return self._run_affine(self.base_affine(), args, kwargs)
        if not chain:
            return self.base_layer(*args, **kwargs)
        if not self.kind.activation:
            return self._run_affine(self.fold(chain), args, kwargs)
        if args:
            x, args = args[0], args[1:]
        else:
            kwargs = dict(kwargs)
            x = kwargs.pop(next(iter(kwargs)))
        if not torch.compiler.is_compiling() and self.why_not_fused(chain) is None:
            y = run_chain(self, chain, x, args, kwargs)
            if y is not None:
                return y
        return Inner(self, chain, len(chain), args, kwargs)(x)

    def _run_affine(self, affine: Affine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not args:
            kwargs = dict(kwargs)
            args = (kwargs.pop(next(iter(kwargs))),)
        return self.kind.run(self.leaf_layer, self.site, affine, args[0], args[1:], kwargs)

    def _routed(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run each adapter on the samples that ask for it."""
        return run_routed(self, call, args, kwargs)

    def _run_named(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the layer with one adapter over it, or bare where it lacks that adapter."""
        return self._run(self.entries.get(name, ()), args, kwargs)

    def extra_repr(self) -> str:
        return f"kind={self.kind.name}, adapters={list(self.entries)}"

    # -- merging one layer; models merge through core.merge ----------------------------------------------------------

    @torch.no_grad()
    def write(self, tensors: dict[str, Tensor], merged: tuple[str, ...], kept: dict[str, Tensor]) -> None:
        """Write merged tensors into the base layer and remember what was there."""
        leaf = self.leaf_layer
        for name, tensor in tensors.items():
            storage.write(leaf, name, tensor)
        self.__dict__["_merged"] = merged
        self.state.roster += 1
        self.__dict__["_kept"] = kept
        self._forget_chain()
        if self.state.fixed is not None:
            self.state.fixed.place(self)

    def restore(self) -> None:
        """Put back, bitwise, what was there before anything was merged.

        Raises:
            StateError: nothing was kept.
        """
        if not self._merged:
            return
        if not self._kept:
            raise StateError(
                f"{self.site.name!r}: the original weight was not kept when adapters were merged (keep='none')"
            )
        self.write(self._kept, (), {})
