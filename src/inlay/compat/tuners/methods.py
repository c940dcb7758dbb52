"""The tuners of the methods that Inlay has (``LoraModel``, ``IA3Model``, ...), and how their hooks make layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, ClassVar

from torch import nn

from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.layers.constructed import ConstructedLayer, _overrides, attach
from inlay.compat.layers.making import own_config
from inlay.compat.layers.views import provide as layer_class
from inlay.compat.tuners.base import KEY_HOOKS, BaseTuner, TunerClass
from inlay.compat.tuners.functions import get_device_map
from inlay.compat.tuners.injection import Injection, running
from inlay.config.defaults import default_targets, families
from inlay.core.build import build, build_shared
from inlay.core.hanging import hang
from inlay.core.inject import occupy
from inlay.core.kind import kind_of
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.parameter import plan_parameters
from inlay.core.patterns import matcher, pattern_value
from inlay.core.plan import Plan, place_method
from inlay.core.policy import PEFT
from inlay.core.registry import method_class
from inlay.core.replicate import replication_of
from inlay.core.state import State
from inlay.core.targets import places
from inlay.errors import TargetError, UnknownMethodError
from inlay.kinds.attention import AttentionLayer, Output, OutputLayer
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
            _adapt_parameter(self, adapter_name, peft_config, current_key)
            return
        while isinstance(target, BaseTunerLayer) and not isinstance(target, (AdaptedLayer, self.tuner_layer_cls)):
            above: Any = target  # another method's layer, written by a user
            parent, target_name, target = above, "base_layer", above.base_layer
        given = self._arguments(peft_config, target, current_key)
        if isinstance(target, AdaptedLayer):
            _add(target, peft_config, adapter_name, given)
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
            **_numbers(config, key),
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
        return _layer_over(config, adapter_name, target, kwargs)


class _LoraHooks(MethodTuner):
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
        numbers = _numbers(config, key)
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
            given["tied_adapter"] = _sharing(self.state, target)
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
        return _layer_over(config, adapter_name, target, kwargs)


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
        return _layer_over(vera_config, adapter_name, target, kwargs)


class _NormHooks(MethodTuner):
    def _new(self, config: Any, adapter: str, target: nn.Module, given: dict[str, Any]) -> nn.Module:
        made: nn.Module = self._create_new_module(config, target, adapter)
        return made

    def _create_new_module(self, peft_config: Any, target: nn.Module, adapter_name: str) -> nn.Module:  # type: ignore[override]
        """Return the adapted layer that is to stand where ``target`` stands."""
        return _layer_over(peft_config, adapter_name, target, {})


class _TokensHooks(MethodTuner):
    def _new(self, config: Any, adapter: str, target: nn.Module, given: dict[str, Any]) -> nn.Module:
        made: nn.Module = self._create_new_module(config, adapter, target, tied_adapter=None)
        return made

    @staticmethod
    def _create_new_module(  # type: ignore[override]
        peft_config: Any, adapter_name: str, target: nn.Module, tied_adapter: Any = None
    ) -> nn.Module:
        """Return the adapted layer that is to stand where ``target`` stands."""
        return _layer_over(peft_config, adapter_name, target, {"tied_adapter": tied_adapter})


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
# folder of peft.tuners -> its mixin of layers, where that is not called after the configuration
_LAYERS = {"loha": "LoHaLayer", "lokr": "LoKrLayer"}


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
    mapping = {family: default_targets(peft_type, family) for family in families(peft_type)}
    members: dict[str, Any] = {
        "__module__": f"inlay.compat.peft.{home}.model",
        "__qualname__": f"{name}Model",
        "__doc__": f"``base_model`` of a model with adapters of {peft_type}; what it does stands in ``BaseTuner``.",
        "peft_type": peft_type,
        "prefix": method.prefix,
        "target_module_mapping": mapping,
        "tuner_layer_cls": layer_class(f"{home}.layer", _LAYERS.get(peft_type.lower(), f"{name}Layer")),
        "_claims": staticmethod(partial(_claims, peft_type)),
    }
    made: Any = TunerClass(f"{name}Model", (_HOOKS.get(peft_type, MethodTuner),), members)
    return made


def _claims(peft_type: str, tuner: Any) -> bool:
    """Whether a tuner that was made before these classes were would be one of this method's."""
    first = next(iter(tuner.state.records.values()), None)
    if type(tuner) is not AdapterModel or first is None:
        return False
    return str(getattr(first.config.peft_type, "value", first.config.peft_type)) == peft_type


# -- layers -----------------------------------------------------------------------------------------------------------


def _numbers(config: Any, key: str) -> dict[str, Any]:
    """Return the numbers that a configuration gives for a path, patterns applied."""
    return {
        field: pattern_value(getattr(config, pattern, None), key, getattr(config, field), False)
        for field, pattern in _PATTERNS.items()
        if hasattr(config, field)
    }


_PATTERNS = {
    "r": "rank_pattern",
    "lora_alpha": "alpha_pattern",
    "alpha": "alpha_pattern",
    "n_frequency": "n_frequency_pattern",
}


def _method(config: Any, given: dict[str, Any], inside: Injection | None, key: str) -> Method:
    """Return the method for one layer: the adapter's own, unless numbers were given that it does not have."""
    if inside is not None and inside.config is config:
        usual = _numbers(config, key)
        if all(given.get(name, value) == value for name, value in usual.items()):
            return inside.method
    cls = method_class(config.peft_type)
    return cls.variant(config)(own_config(config, given))


def _layer_over(config: Any, adapter: str, target: Any, given: dict[str, Any]) -> nn.Module:
    inside = running()
    key = str(given.get("target_name") or ("" if inside is None else inside.key))
    kind = kind_of(target)
    if kind is None:
        raise TargetError(
            f"{key!r} is a {type(target).__name__}, and no adapter of "
            f"{getattr(config.peft_type, 'value', config.peft_type)} can work on that"
        )
    state = State(policy=PEFT) if inside is None else inside.state
    layer = kind.adapt(target, kind.site(key, target), state)
    if isinstance(layer, AttentionLayer) and layer.output is None:
        out = target.out_proj
        site = replace(Output().site(f"{key}.out_proj", out), patterns=key)
        target._modules["out_proj"] = OutputLayer(out, Output(), site, state)
    _add(layer, config, adapter, given)
    return layer


def _add(layer: AdaptedLayer, config: Any, adapter: str, given: dict[str, Any]) -> None:
    """Give one of the engine's layers the adapter."""
    inside = running()
    if isinstance(layer, ConstructedLayer) and _overrides(layer, "update_layer"):
        named = {name: given[name] for name in layer._recorded.update_signature.parameters if name in given}
        layer.update_layer(adapter, **{**named, "config": config})
        return
    method = _method(config, given, inside, layer.site.owner)
    if inside is not None:
        _share(inside, method)
    targets = [layer]
    if isinstance(layer, AttentionLayer) and layer.output is not None:
        targets.append(layer.output)
    for one in targets:
        attach(one, adapter, method, tied=given.get("tied_adapter") or None)
        if inside is not None and inside.low_memory:
            _empty(one, adapter)


def _share(inside: Injection, method: Method) -> None:
    """Make the tensors that all layers of an adapter share, for every layer that the configuration means."""
    record = inside.state.records[inside.adapter]
    if type(method).shared_slots is Method.shared_slots or record.shared:
        return
    made = Plan(inside.model, inside.adapter, inside.config, method, inside.state.policy, inside.state, False)
    for place in places(inside.model):
        meant = inside.tuner._check_target_module_exists(inside.config, place.path)
        if meant and kind_of(place.base) is not None:
            made.placements.append(place_method(made, place, "shared", method))
    made.shared = method.shared_slots([placement.site for placement in made.placements])
    record.shared = dict(made.shared)
    for role, tensor in build_shared(made, inside.low_memory, record.seed).items():
        hang(inside.state.shared, inside.adapter, made.shared[role], tensor, nn.Module)


def _sharing(state: State, target: nn.Module) -> Any:
    """Return the adapted layer whose weight a module has."""
    held: Any = getattr(target, "weight", None)
    layers = (layer for layer in state.layers() if isinstance(layer, AdaptedLayer))
    return next((layer for layer in layers if getattr(layer.get_base_layer(), "weight", None) is held), {})


def _empty(layer: AdaptedLayer, adapter: str) -> None:
    """Put an adapter's tensors at one layer on the meta device, for a load to fill."""
    for entry in layer._each([adapter]):
        for _, containers, leaf in entry.places if entry.home is None else ():
            holder: Any = layer
            for part in containers:
                holder = holder._modules[part]
            owner, name = (holder._modules[adapter], leaf) if leaf else (holder, adapter)
            held = owner._parameters.get(name)
            if held is not None:
                owner._parameters[name] = nn.Parameter(held.to("meta"), requires_grad=held.requires_grad)


def _adapt_parameter(tuner: Any, adapter: str, config: Any, key: str) -> None:
    """Give one parameter of a module the adapter."""
    state = tuner.state
    record = state.records[adapter]
    made = Plan(tuner.model, adapter, config, record.method, state.policy, state, False)
    plan_parameters(made, places(tuner.model))
    made.placements = [one for one in made.placements if f"{one.place.path}.{one.site.parameter}" == key]
    inside = running()
    low_memory = inside is not None and inside.low_memory
    built = [(one, build(made, one, low_memory, True, record.seed)) for one in made.placements]
    occupy(made, state, built, [])
