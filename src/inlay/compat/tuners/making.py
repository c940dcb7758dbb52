"""How the hooks of PEFT's methods make the engine's layers, one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from inlay.compat.layers.constructed import ConstructedLayer, _overrides, attach
from inlay.compat.layers.making import own_config
from inlay.compat.tuners.injection import Injection, running
from inlay.core.build import build, build_shared
from inlay.core.hanging import hang
from inlay.core.inject import occupy
from inlay.core.kind import kind_of
from inlay.core.layer import AdaptedLayer
from inlay.core.method import Method
from inlay.core.parameter import plan_parameters
from inlay.core.patterns import pattern_value
from inlay.core.plan import Plan, place_method
from inlay.core.policy import PEFT
from inlay.core.registry import method_class
from inlay.core.shared import share_out
from inlay.core.state import State
from inlay.core.targets import places
from inlay.errors import NotAvailableError, TargetError
from inlay.kinds.attention import AttentionLayer, Output, OutputLayer

__all__ = ["adapt_parameter", "add_to", "layer_over", "layer_sharing", "numbers_for"]


def numbers_for(config: Any, key: str) -> dict[str, Any]:
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
        usual = numbers_for(config, key)
        if all(given.get(name, value) == value for name, value in usual.items()):
            return inside.method
    cls = method_class(config.peft_type)
    return cls.variant(config)(own_config(config, given))


def layer_over(config: Any, adapter: str, target: Any, given: dict[str, Any]) -> nn.Module:
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
    add_to(layer, config, adapter, given)
    return layer


def add_to(layer: AdaptedLayer, config: Any, adapter: str, given: dict[str, Any]) -> None:
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
    if type(method).derive_shared is not Method.derive_shared:
        raise NotAvailableError(
            f"{type(method).__name__} shares tensors that follow from the weights of all layers, which hooks make one "
            "by one; leave the hooks of its tuner as they are"
        )
    made = Plan(inside.model, inside.adapter, inside.config, method, inside.state.policy, inside.state, False)
    for place in places(inside.model):
        meant = inside.tuner._check_target_module_exists(inside.config, place.path)
        if meant and kind_of(place.base) is not None:
            made.placements.append(place_method(made, place, "shared", method))
    share_out(made)
    record.shared = dict(made.shared)
    for role, tensor in build_shared(made, inside.low_memory, record.seed).items():
        hang(inside.state.shared, inside.adapter, made.shared[role], tensor, nn.Module)


def layer_sharing(state: State, target: nn.Module) -> Any:
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


def adapt_parameter(tuner: Any, adapter: str, config: Any, key: str) -> None:
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
