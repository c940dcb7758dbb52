"""The tuners of the methods that Inlay has (``LoraModel``, ``IA3Model``, ...), and how their hooks make layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.layers.views import provide as layer_class
from inlay.compat.tuners.base import BaseTuner, TunerClass
from inlay.compat.tuners.functions import get_device_map
from inlay.compat.tuners.injection import running
from inlay.compat.tuners.making import adapt_parameter, add_to, layer_over, layer_sharing, numbers_for
from inlay.compat.tuners.overriding import KEY_HOOKS
from inlay.config.defaults import default_targets, families
from inlay.config.types import method_name
from inlay.core.layer import AdaptedLayer
from inlay.core.patterns import matcher
from inlay.core.registry import method_class
from inlay.core.replicate import replication_of
from inlay.errors import UnknownMethodError
from inlay.models.tuner import AdapterModel

__all__ = ["LycorisTuner", "MethodTuner", "tuner_of"]


class MethodTuner(BaseTuner):
    """Base of the tuners whose method the engine knows; its hooks make the engine's layers, one at a time."""

    peft_type: ClassVar[str]

    _saying = (*KEY_HOOKS, "_remove_adapter_name_from_key")  # the engine's layers ask no tuner for their keys

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> Any:
        method = method_class(peft_config.peft_type).variant(peft_config)(peft_config)
        for field, value in method.implied(self.model, model_config.get("model_type")).items():
            setattr(peft_config, field, value)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
        **optional_kwargs: Any,
    ) -> None:
        if parameter_name is not None:
            adapt_parameter(self, adapter_name, peft_config, current_key)
            return
        while isinstance(target, BaseTunerLayer) and not isinstance(target, (AdaptedLayer, self.tuner_layer_cls)):
            above: Any = target  # another method's layer, written by a user
            parent, target_name, target = above, "base_layer", above.base_layer
        given = self._arguments(peft_config, target, current_key)
        if isinstance(target, AdaptedLayer):
            add_to(target, peft_config, adapter_name, given)
        elif isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, **self._updates(given), config=peft_config)
        else:
            new = self._new(peft_config, adapter_name, target, given)
            self._replace_module(parent, target_name, new, target)

    def _new(self, config: Any, adapter: str, target: nn.Module, given: dict[str, Any]) -> nn.Module:
        """Call ``_create_new_module``, whose arguments differ between PEFT's methods."""
        made: nn.Module = self._create_new_module(config, adapter, target, **given)
        return made

    def _arguments(self, config: Any, target: nn.Module, key: str) -> dict[str, Any]:
        """Return what ``_create_new_module`` is told beside configuration, adapter and module."""
        return {
            "loaded_in_8bit": getattr(self.model, "is_loaded_in_8bit", False),
            "loaded_in_4bit": getattr(self.model, "is_loaded_in_4bit", False),
            **numbers_for(config, key),
        }

    def _updates(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return what of it ``update_layer`` of a user's layer is told."""
        return {name: value for name, value in given.items() if not name.startswith("loaded_in_")}

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """Return the adapted layer that is to stand where ``target`` stands.

        Raises:
            TargetError: no adapter can work on a module of that class.
        """
        return layer_over(config, adapter_name, target, kwargs)


class _LoraHooks(MethodTuner):
    def subtract_mutated_init(
        self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: dict[str, Any] | None = None
    ) -> dict[str, Tensor]:
        """Return a trained adapter's tensors as a LoRA of twice the rank over the base before its start.

        Args:
            output_state_dict: the trained adapter's tensors, by their names in a checkpoint.
            adapter_name: an adapter that has the values it started with.
            kwargs: ``state_dict`` holds values of that adapter, instead of the model's own.

        Raises:
            CheckpointMismatchError: the two are of different layers or ranks.
        """
        from inlay.checkpoint.original import subtracted
        from inlay.checkpoint.state_dict import saved_tensors
        from inlay.checkpoint.tree import Tree

        tree = Tree(self.model)
        initial = saved_tensors(tree, adapter_name, (kwargs or {}).get("state_dict"))
        return subtracted(tree, adapter_name, output_state_dict, initial, f"adapter {adapter_name!r}")

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: Any,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Do the same with the values in a folder."""
        from inlay.checkpoint.original import over_original
        from inlay.checkpoint.state_dict import saved_tensors
        from inlay.checkpoint.tree import Tree

        tree = Tree(peft_model)
        own = [name for name, record in tree.state.records.items() if record.config.peft_type == peft_config.peft_type]
        name = next(one for one in own if saved_tensors(tree, one).keys() == output_state_dict.keys())
        return over_original(tree, name, output_state_dict, path_initial_model_for_weight_conversion)

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        state = self.state
        others = state if len(state.records) > 1 else None
        made = replication_of(model, peft_config, others)
        if made is not None:
            made.install(model)
            state.replication = made

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: Any) -> None:
        get: Any = self.model.get_input_embeddings
        table = get()
        path = next(name for name, module in self.model.named_modules() if module is table)
        targets = peft_config.target_modules
        if isinstance(targets, str):
            peft_config.target_modules = f"(?:{targets})|{re.escape(path)}"
        else:
            left = [name for name in targets if not any(matcher([name])(key) for key in tied_weight_keys)]
            peft_config.target_modules = {*left, path}
        peft_config.__dict__["target_modules_to_tie"] = set(tied_weight_keys)

    def _arguments(self, config: Any, target: nn.Module, key: str) -> dict[str, Any]:
        numbers = numbers_for(config, key)
        given = {
            "device_map": get_device_map(self.model),
            "r": numbers["r"],
            "lora_alpha": numbers["lora_alpha"],
            "target_name": key,
            "loaded_in_8bit": getattr(self.model, "is_loaded_in_8bit", False),
            "loaded_in_4bit": getattr(self.model, "is_loaded_in_4bit", False),
            "ephemeral_gpu_offload": config.runtime_config.ephemeral_gpu_offload,
            "parameter_name": None,
            "tied_adapter": {},
        }
        inside = running()
        if inside is not None and inside.tying:
            given["tied_adapter"] = layer_sharing(self.state, target)
        return given

    def _updates(self, given: dict[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in ("r", "lora_alpha", "target_name")}

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        """Return the layer that stands over ``target``: one that the configuration brings for its class, or Inlay's.

        Raises:
            TargetError: no adapter can work on a module of that class.
        """
        for cls, layer in (getattr(config, "_custom_modules", None) or {}).items():
            if isinstance(target, cls):
                made: nn.Module = layer(target, adapter_name, config=config, **kwargs)
                return made
        return layer_over(config, adapter_name, target, kwargs)


class _IA3Hooks(MethodTuner):
    @staticmethod
    def _check_target_module_feedforward(ia3_config: Any, key: str) -> bool:
        """Whether a path is one of ``feedforward_modules``, whose input is rescaled."""
        return matcher(ia3_config.feedforward_modules or [])(key) is not None

    def _arguments(self, config: Any, target: nn.Module, key: str) -> dict[str, Any]:
        marked = self._check_target_module_feedforward(config, key)
        return {"is_feedforward": marked, **super()._arguments(config, target, key)}

    def _updates(self, given: dict[str, Any]) -> dict[str, Any]:
        return {}


class _VeraHooks(MethodTuner):
    uses_shared_state = True

    def _new(self, config: Any, adapter: str, target: nn.Module, given: dict[str, Any]) -> nn.Module:
        shared = self.state.shared._modules
        made: nn.Module = self._create_new_module(
            config, shared.get("vera_A"), shared.get("vera_B"), adapter, target, **given
        )
        return made

    @staticmethod
    def _create_new_module(  # type: ignore[override]
        vera_config: Any, vera_A: Any, vera_B: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        """Return the adapted layer that is to stand where ``target`` stands."""
        return layer_over(vera_config, adapter_name, target, kwargs)


class _NormHooks(MethodTuner):
    def _new(self, config: Any, adapter: str, target: nn.Module, given: dict[str, Any]) -> nn.Module:
        made: nn.Module = self._create_new_module(config, target, adapter)
        return made

    def _create_new_module(self, peft_config: Any, target: nn.Module, adapter_name: str) -> nn.Module:  # type: ignore[override]
        """Return the adapted layer that is to stand where ``target`` stands."""
        return layer_over(peft_config, adapter_name, target, {})


class _TokensHooks(MethodTuner):
    def _new(self, config: Any, adapter: str, target: nn.Module, given: dict[str, Any]) -> nn.Module:
        made: nn.Module = self._create_new_module(config, adapter, target, tied_adapter=None)
        return made

    @staticmethod
    def _create_new_module(  # type: ignore[override]
        peft_config: Any, adapter_name: str, target: nn.Module, tied_adapter: Any = None
    ) -> nn.Module:
        """Return the adapted layer that is to stand where ``target`` stands."""
        return layer_over(peft_config, adapter_name, target, {"tied_adapter": tied_adapter})


class LycorisTuner(MethodTuner):
    """Base of the tuners of LoHa and LoKr."""

    layers_mapping: ClassVar[Mapping[Any, Any]] = {}


_HOOKS: dict[str, type[MethodTuner]] = {
    "LORA": _LoraHooks,
    "IA3": _IA3Hooks,
    "VERA": _VeraHooks,
    "LN_TUNING": _NormHooks,
    "TRAINABLE_TOKENS": _TokensHooks,
    "LOHA": LycorisTuner,
    "LOKR": LycorisTuner,
}
# folder of peft.tuners -> folder and name of the mixin of its layers, where that is not called after the configuration
_LAYERS = {"loha": ("loha", "LoHaLayer"), "lokr": ("lokr", "LoKrLayer"), "adalora": ("lora", "LoraLayer")}


@lru_cache(maxsize=128)
def tuner_of(peft_type: str) -> type[MethodTuner] | None:
    """Return the tuner of a method that Inlay has, None for any other."""
    from inlay.compat.tuners.own import brought

    if peft_type in brought:
        return None
    try:
        method = method_class(peft_type)
    except UnknownMethodError:
        return None
    name = method.config_class.__name__.removesuffix("Config")
    home = f"tuners.{peft_type.lower()}"
    folder, layer = _LAYERS.get(peft_type.lower(), (peft_type.lower(), f"{name}Layer"))
    mapping = {family: default_targets(peft_type, family) for family in families(peft_type)}
    members: dict[str, Any] = {
        "__module__": f"inlay.compat.peft.{home}.model",
        "__qualname__": f"{name}Model",
        "__doc__": f"``base_model`` of a model with adapters of {peft_type}; what it does stands in ``BaseTuner``.",
        "peft_type": peft_type,
        "prefix": method.prefix,
        "target_module_mapping": mapping,
        "tuner_layer_cls": layer_class(f"tuners.{folder}.layer", layer),
        "_claims": staticmethod(partial(_claims, peft_type)),
    }
    made: Any = TunerClass(f"{name}Model", (_HOOKS.get(peft_type, MethodTuner),), members)
    return made


def _claims(peft_type: str, tuner: Any) -> bool:
    """Whether a tuner that was made before these classes were would be one of this method's."""
    first = next(iter(tuner.state.records.values()), None)
    return type(tuner) is AdapterModel and first is not None and method_name(first.config.peft_type) == peft_type
