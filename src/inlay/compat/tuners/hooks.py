"""The hooks that putting an adapter in calls, in their order, as they are where no class overrides them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from inlay.compat.constants import DUMMY_MODEL_CONFIG, EMBEDDING_LAYER_NAMES
from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.other import _get_module_names_tied_with_embedding
from inlay.compat.tuners.functions import cast_adapter_dtype
from inlay.compat.tuners.matching import (
    _check_lora_target_modules_mamba,
    _ExcludedModule,
    check_target_module_exists,
)
from inlay.core.active import adapter_parameters
from inlay.core.follow import follower_of
from inlay.core.mount import ModuleCopies
from inlay.core.parameter import plan_parameters
from inlay.core.plan import Plan
from inlay.core.state import State
from inlay.core.targets import base_parameters, places
from inlay.errors import InlayWarning, NotAvailableError, TargetError, UnsupportedError

__all__ = ["InjectionHooks"]


class InjectionHooks:
    """Mixed into ``BaseTuner``."""

    tuner_layer_cls: ClassVar[Any] = BaseTunerLayer
    target_module_mapping: ClassVar[Mapping[str, Any]] = {}

    if TYPE_CHECKING:
        prefix: ClassVar[str]
        model: nn.Module
        state: State
        active_adapters: list[str]

        @property
        def peft_config(self) -> dict[str, Any]: ...

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Do something before the first adapter comes."""

    def _check_new_adapter_config(self, config: Any) -> None:
        """Refuse a configuration that does not go with those that are there.

        Raises:
            UnsupportedError: two adapters would train the base biases.
        """
        held = self.peft_config
        biased = [name for name, one in held.items() if (getattr(one, "bias", None) or "none") != "none"]
        if len(held) > 1 and len(biased) > 1:
            raise UnsupportedError(
                f"bias: {' and '.join(map(repr, biased))} would both train the base biases, and they are shared; set "
                "bias='none' for all but one"
            )

    def _check_tied_modules(self, model: nn.Module, peft_config: Any) -> None:
        """See to layers that share the weight of an adapted embedding: adapt them together, or warn."""
        tied = self._get_module_names_tied_with_embedding()
        targets = getattr(peft_config, "target_modules", None)
        adapted = _names_embedding(targets)
        copied = _names_embedding(getattr(peft_config, "modules_to_save", None))
        if getattr(peft_config, "ensure_weight_tying", False):
            if not tied or not (adapted or copied):
                why = (
                    "the model has no layer that shares an embedding's weight"
                    if not tied
                    else "no such layer is adapted"
                )
                warnings.warn(f"ensure_weight_tying is set, and {why}", InlayWarning, stacklevel=2)
            elif copied:
                self._add_modules_to_save_to_tie(peft_config, tied)
            else:
                self._add_targets_to_tie(peft_config, tied)
        elif tied and (adapted or copied):
            warnings.warn(
                f"{', '.join(map(repr, tied))} shares the embedding's weight and is not adapted together with it",
                InlayWarning,
                stacklevel=2,
            )

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """Return the paths of the modules whose weight is the input embedding's."""
        return _get_module_names_tied_with_embedding(self.model)

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: Sequence[str]) -> None:
        """Let full copies of layers that share a weight share it too; they do so by themselves."""

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: Sequence[str]) -> None:
        """Let adapted layers that share a weight share their adapter: the embedding has it, the others use it.

        Raises:
            NotAvailableError: the method does not say how.
        """
        raise NotAvailableError(f"{type(self).__name__} does not say how layers share an adapter (ensure_weight_tying)")

    @staticmethod
    def get_model_config(model: nn.Module) -> Any:
        """Return what a model says of itself as a dict; of one that says nothing, that its family is ``custom``."""
        config = getattr(model, "config", None)
        if config is None:
            return dict(DUMMY_MODEL_CONFIG)
        return config.to_dict() if hasattr(config, "to_dict") else config

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        """Fill in ``target_modules`` that were left to the model; returns the configuration to go on with.

        Raises:
            TargetError: the model's family has no defaults.
        """
        if peft_config.target_modules is None:
            family = model_config.get("model_type")
            found = self.target_module_mapping.get(family)
            if found is None:
                raise TargetError(
                    f"target_modules is not set and the model family {family!r} has no default for "
                    f"{type(self).__name__}; set target_modules"
                )
            peft_config.target_modules = found if isinstance(found, str) else set(found)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Change the model before its modules are matched."""

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool | re.Match[str] | _ExcludedModule | None:
        """Whether the module at a path is meant; see ``check_target_module_exists``."""
        return check_target_module_exists(peft_config, key)

    @staticmethod
    def _check_tied_module_exists(peft_config: Any, key: str) -> bool:
        """Whether the module at a path is to use the adapter of a layer with the same weight."""
        names = getattr(peft_config, "target_modules_to_tie", None) or ()
        return any(key == name or key.endswith(f".{name}") for name in names)

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Refuse a module that the method cannot work on in this model."""
        _check_lora_target_modules_mamba(peft_config, model, target_name)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Give one module the adapter: put an adapted layer in its place, or add to the one that is there.

        Args:
            peft_config: the adapter's configuration.
            adapter_name: its name.
            target: the module, or the adapted layer that stands there.
            target_name: its attribute in ``parent``.
            parent: the module that holds it.
            current_key: its path.
            parameter_name: adapt this parameter of it instead.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how a module is adapted (_create_and_replace)")

    def _create_and_replace_parameter(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Give one parameter the adapter."""
        raise NotImplementedError(f"{type(self).__name__} does not say how a parameter is adapted")

    def _inject_parameters(
        self, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Give the parameters that ``target_parameters`` names the adapter; returns their paths."""
        state = self.state
        made = Plan(model, adapter_name, peft_config, state.records[adapter_name].method, state.policy, state, False)
        plan_parameters(made, places(model))
        for placement in made.placements:
            place, parameter = placement.place, placement.site.parameter
            parent, name = place.parents[0]
            target = parent._modules[name]
            assert target is not None
            self._check_target_module_compatiblity(peft_config, model, name)
            key = f"{place.path}.{parameter}"
            self._create_and_replace(
                peft_config, adapter_name, target, name, parent, current_key=key, parameter_name=parameter
            )
        return [f"{placement.place.path}.{placement.site.parameter}" for placement in made.placements]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: Any, child: Any) -> None:
        """Put a module in the place of another, and what is new in it on the device of that one's weight."""
        setattr(parent, child_name, new_module)
        child = getattr(child, "base_layer", child)
        if not hasattr(new_module, "base_layer"):
            if new_module is not child:
                new_module.weight = child.weight
                if hasattr(child, "bias"):
                    new_module.bias = child.bias
            return
        if follower_of(new_module) is not None:
            return  # one of the engine's, created where the base weight is
        anchor = next((held for held in _weights(child)), None)
        for name, module in new_module.named_modules():
            inside = name.split(".")[0] not in ("", "base_layer")
            if anchor is not None and inside and not any(p.is_meta for p in module.parameters(recurse=False)):
                for table in (module._parameters, module._buffers):
                    for held in table.values():
                        if held is not None and held.device != anchor.device and not anchor.is_meta:
                            held.data = held.data.to(anchor.device)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze what belongs to no adapter, except for the base biases that active adapters train.

        Raises:
            NotImplementedError: an unknown ``bias``.
        """
        state = self.state
        own = {id(parameter) for parameter in adapter_parameters(state, list(state.records))}
        copied = {id(p) for module in model.modules() if isinstance(module, ModuleCopies) for p in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in own | copied:
                parameter.requires_grad_(False)
        named = {name: p for name, p in base_parameters(model).items() if name.rpartition(".")[2] == "bias"}
        for name in self.active_adapters:
            record = state.records[name]
            mode = getattr(record.config, "bias", None) or "none"
            if mode == "none":
                continue
            if mode == "all":
                wanted = named
            elif mode.endswith("_only"):
                layers = [module for module in model.modules() if isinstance(module, self.tuner_layer_cls)]
                held = {id(getattr(layer, "bias", None)) for layer in layers}
                wanted = {path: p for path, p in named.items() if id(p) in held}
            else:
                raise _UnknownBias(f"bias={mode!r}: expected 'none', 'all' or '{self.prefix}only'")
            record.biases = tuple(wanted)
            for path, parameter in wanted.items():
                state.base_values.setdefault(path, parameter.detach().clone())
                parameter.requires_grad_(True)
        for module in model.modules():
            if isinstance(module, self.tuner_layer_cls) and hasattr(module, "_freeze_non_trainable_peft_weights"):
                module._freeze_non_trainable_peft_weights()

    def _post_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Do something after the first adapter came."""

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Raise what an adapter has in half precision to float32, unless told not to."""
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)


class _UnknownBias(UnsupportedError, NotImplementedError):
    """PEFT raises a NotImplementedError there."""


def _names_embedding(names: Any) -> bool:
    """Whether patterns may mean an embedding or output head, as far as their last part says."""
    if isinstance(names, str):
        return any(re.fullmatch(names, name) for name in EMBEDDING_LAYER_NAMES)
    return any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in names or ())


def _weights(child: Any) -> Iterator[Tensor]:
    for name in ("qweight", "W_q", "weight", "in_proj_weight"):
        held = getattr(child, name, None)
        if isinstance(held, Tensor):
            yield held
    yield from child.parameters()
