"""Token rows that train beside another method: ``TrainableTokensWrapper`` over the engine's layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from inlay.compat.layers.constructed import attach
from inlay.compat.layers.others import BufferDict, replaced_rows
from inlay.compat.layers.viewing import LayerView
from inlay.core.active import the_one
from inlay.core.kind import kind_of
from inlay.core.layer import AdaptedLayer
from inlay.core.policy import PEFT
from inlay.core.registry import method_class
from inlay.core.state import State
from inlay.errors import ConfigTypeError, TargetError

__all__ = ["TokenAdapter", "TokenMembers", "TrainableTokensWrapper", "refuse_container", "token_entries"]

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


def token_entries(layer: Any, name: str | None = None) -> list[Any]:
    """Return the entries of a layer that train token rows beside another method, of one adapter or of all."""
    if not isinstance(layer, AdaptedLayer):
        return []
    entries = layer._each() if name is None else layer._each([name])
    return [entry for entry in entries if any(path[0] == "token_adapter" for _, path, _ in entry.places)]


def refuse_container(owner: str, module: nn.Module) -> None:
    """Refuse what has no forward pass of its own to stand for, or is adapted already.

    Raises:
        ConfigTypeError: it is a container or a layer with adapters.
    """
    if isinstance(module, (*_CONTAINERS, AdaptedLayer)):
        raise ConfigTypeError(f"{owner} cannot be applied to a {type(module).__name__}")


class TokenAdapter(nn.Module):
    """The token rows of a layer, read and changed as PEFT's layer of their own that holds them.

    The engine keeps the rows at the adapted layer. This has the same tensors below it, and what it does not have itself
    is asked of that layer: ``token_indices``, ``base_layer``, ``merge``, ``set_adapter``. ``merge`` and ``unmerge``
    write everything that an adapter has at the layer.

    Args:
        layer: the adapted layer.
        held: the modules that hold the rows by name, of this layer or of the one that it shares them with.
    """

    def __init__(self, layer: AdaptedLayer, held: dict[str, nn.Module | None]) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # no submodule: the layer is above
        self.__dict__["_modules"] = held  # the very dict, so that rows of further adapters appear

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "layer" not in self.__dict__:
                raise
        return getattr(self.__dict__["layer"], name)

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have rows here."""
        return [name for name in self.layer.active_adapters if token_entries(self.layer, name)]

    @property
    def active_adapter(self) -> list[str]:
        """The same as ``active_adapters``."""
        return self.active_adapters

    @property
    def trainable_tokens_original(self) -> BufferDict:
        """Rows of the base layer that adapters replace, (tokens, features), by adapter name."""
        return replaced_rows(self.layer, token_entries(self.layer))

    @property
    def tied_adapter(self) -> Any:
        """The rows of the layer that this one shares them with, or None."""
        home = next((entry.home for entry in token_entries(self.layer) if entry.home is not None), None)
        return None if home is None else _token_adapter(home)

    def get_merged_weights(self, active_adapters: list[str]) -> Tensor:
        """Return the table, (tokens, features), with the rows of some adapters in it."""
        chain = tuple(entry for name in active_adapters for entry in token_entries(self.layer, name))
        weight: Tensor = self.layer.kind.from_matrix(self.layer.site, self.layer.fold(chain).weight)
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        return self.layer(*args, **kwargs)


def _token_adapter(layer: AdaptedLayer) -> TokenAdapter:
    """Return the token rows of a layer, one object as long as the layer keeps its rows.

    Raises:
        AttributeError: it has none beside another method.
    """
    homes = [layer if entry.home is None else entry.home for entry in token_entries(layer)]
    holder = homes[0]._modules.get("token_adapter") if homes else None
    if holder is None:
        raise AttributeError(f"{layer.site.name!r} has no token rows beside another method")
    found = layer.__dict__.get("_token_adapter")
    if found is None or found._modules is not holder._modules:
        found = layer.__dict__["_token_adapter"] = TokenAdapter(layer, holder._modules)
    return found


class TokenMembers:
    """What a layer with token rows beside another method is asked for as a wrapper of its layer."""

    def update(self: Any, active_adapter: str, **kwargs: Any) -> None:
        """Give a further adapter its rows, ``token_indices``, or those of ``tied_adapter``."""
        if token_entries(self, active_adapter):
            return
        tied = kwargs.get("tied_adapter")
        if isinstance(tied, TokenAdapter):
            tied = tied.layer
        tokens: Any = method_class("TRAINABLE_TOKENS")
        held = token_entries(tied, active_adapter)
        indices = held[0].options["token_indices"] if held else list(kwargs["token_indices"])
        method = tokens(tokens.config_class(token_indices=indices), under="token_adapter.")
        attach(self, active_adapter, method, tied=tied, beside=True)

    @property
    def token_adapter(self: Any) -> TokenAdapter:
        """The token rows, as a layer."""
        return _token_adapter(self)

    @property
    def original_module(self: Any) -> nn.Module:
        """The layer without adapters."""
        base: nn.Module = self.get_base_layer()
        return base

    @property
    def _adapters(self: Any) -> set[str]:
        return {entry.name for entry in token_entries(self)}

    def check_set_adapter(self: Any, adapter_name: str | list[str]) -> str | None:
        """Return which of some adapters has rows here, or None.

        Raises:
            TargetError: no adapter was named.
            UnsupportedError: more than one has.
        """
        return the_one(adapter_name, self._adapters, f"{self.site.name!r}: only one adapter can replace rows")

    def adapter_state_dict_load_map(self: Any, adapter_name: str) -> dict[str, str]:
        """Return the name of an adapter's rows in a checkpoint, with the one that they have below this layer."""
        slots = (
            slot
            for entry in token_entries(self, adapter_name)
            for slot in entry.method.slots(entry.site).values()
            if entry.home is None and slot.saved
        )
        return {slot.disk_name: slot.memory_name(adapter_name) for slot in slots}

    def adapter_state_dict(self: Any, adapter_name: str, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Pick an adapter's rows out of this layer's ``state_dict``, under the name of a checkpoint."""
        return {name: state_dict[here] for name, here in self.adapter_state_dict_load_map(adapter_name).items()}

    def unload_and_optionally_merge_module(
        self: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer without adapters, with their rows written into it if ``merge``."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base: nn.Module = self.get_base_layer()
        return base


class TrainableTokensWrapper(TokenMembers, AdaptedLayer, metaclass=LayerView):
    """Token rows beside another method, constructed by themselves over an embedding or an output head.

    Args:
        module_to_save: the layer.
        adapter_name: the first adapter, which is active.
        token_indices: which rows train.
        tied_adapter: a layer that shares the weight, whose rows this one uses.
    """

    _claims = staticmethod(lambda module: bool(token_entries(module)))

    def __init__(
        self, module_to_save: nn.Module, adapter_name: str, token_indices: list[int], tied_adapter: Any = None
    ) -> None:
        refuse_container("trainable_token_indices", module_to_save)
        kind = kind_of(module_to_save)
        if kind is None:
            raise TargetError(f"{type(module_to_save).__name__} is no layer whose rows are tokens")
        super().__init__(module_to_save, kind, kind.site("", module_to_save), State(policy=PEFT))
        module_to_save.requires_grad_(False)
        self.update(adapter_name, token_indices=token_indices, tied_adapter=tied_adapter)


# A layer that holds the rows itself has a bare module of this name, which `attribute_sources` are not asked for.
AdaptedLayer.token_adapter = property(_token_adapter)  # type: ignore[attr-defined]
