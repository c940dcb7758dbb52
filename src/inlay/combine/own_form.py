"""Combining adapters in their own form: those of a method whose update is linear in its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.combine.configs import derived, united, united_targets, united_tokens
from inlay.combine.placing import TOKENS, carry, check_tied, layers_of, main_entries, plan_exactly, put
from inlay.combine.rules import Request
from inlay.core.dtype import merge_dtype
from inlay.core.entry import Entry, find_tensor
from inlay.core.layer import AdaptedLayer
from inlay.core.method import P
from inlay.core.state import State
from inlay.errors import CombinationError
from inlay.parallel.tensors import is_distributed, scatter

__all__ = ["add_in_own_form", "no_own_form"]


def no_own_form(model: nn.Module, state: State, adapters: Sequence[str]) -> str | None:
    """Return one sentence that says why adapters have no form in which they add up, or None."""
    kinds = {name: state.record(name).config.peft_type for name in adapters}
    first = adapters[0]
    for name, kind in kinds.items():
        if kind != kinds[first]:
            return f"{first!r} and {name!r} are of different methods"
    method = type(state.record(first).method).__name__
    if any(not state.record(name).method.linear for name in adapters):
        return f"the update of {method} is not linear in its tensors"
    if kinds[first] == TOKENS:
        return None  # rows of different tokens are put side by side
    for layer in layers_of(model):
        held = [(name, entry) for name in adapters for entry in main_entries(layer, name)]
        for name, entry in held[1:]:
            what = _differ(layer, held[0][1], entry)
            if what is not None:
                return f"{held[0][0]!r} and {name!r} differ in {what} at {layer.site.name!r}"
    return None


def _differ(layer: AdaptedLayer, one: Entry, other: Entry) -> str | None:
    """Return what two adapters have that is not alike and does not add up, or None."""
    if type(one.method) is not type(other.method):
        return "their variant"
    if getattr(one.method, "rows", None) != getattr(other.method, "rows", None):
        return "their rows"
    for option in one.options.keys() - {"scaling"}:
        if one.options[option] != other.options[option]:
            return option
    first, second = (layer.params(entry) for entry in (one, other))
    for role, place in _roles(one):
        a, b = getattr(first, role), getattr(second, role)
        if a.shape != b.shape:
            return f"the shape of {place}"
        if role not in one.method.linear and not torch.equal(a, b):
            return place
    return None


def _roles(entry: Entry) -> Iterator[tuple[str, str]]:
    """Iterate over an entry's tensors: role and name."""
    for role, containers, leaf in (*entry.places, *entry.shared):
        yield role, ".".join((*containers, leaf)).strip(".")


def add_in_own_form(model: nn.Module, state: State, request: Request) -> None:
    """Combine adapters that :func:`no_own_form` has nothing against into a new one of their method."""
    configs = [state.record(name).config for name in request.adapters]
    held = [(layer, e) for layer in layers_of(model) for name in request.adapters for e in main_entries(layer, name)]
    more: dict[str, Any] = {}
    if configs[0].peft_type == TOKENS:
        more["token_indices"] = list(dict.fromkeys(index for config in configs for index in config.token_indices))
    for field, unite in (("modules_to_save", united), ("trainable_token_indices", _tokens)):
        if hasattr(configs[0], field):
            more[field] = unite(configs, field)
    config = derived(configs[0], target_modules=united_targets(configs, "target_modules"), **more)
    tensors = [tensor for layer, entry in held for tensor, _ in entry.parameters(layer)]
    wide = any(tensor.dtype.itemsize >= 4 for tensor in tensors) or not tensors
    made = plan_exactly(model, config, request.name, {entry.site.name for _, entry in held}, autocast=wide)

    def fill(state: State) -> None:
        check_tied(model, request.name, request.adapters)
        for layer in layers_of(model):
            for entry in main_entries(layer, request.name):
                if entry.home is None:
                    _fill_layer(layer, entry, request)
        if config.peft_type != TOKENS:
            carry(model, state, request.name, request.adapters, request.weights)

    put(made, fill)


def _tokens(configs: Sequence[Any], field: str) -> Any:
    return united_tokens(configs)


def _fill_layer(layer: AdaptedLayer, entry: Entry, request: Request) -> None:
    weighted = zip(request.adapters, request.weights, strict=True)
    held = [(weight, other) for name, weight in weighted for other in main_entries(layer, name)]
    if entry.method.config.peft_type != TOKENS:
        what = _differ(layer, held[0][1], _values_of(layer, held[0][1], entry))
        if what is not None:
            raise CombinationError(
                f"the configuration of {request.adapters[0]!r} gives another {what} at {layer.site.name!r} than the "
                "adapters have there; 'cat' and the types that end in 'svd' combine them into a LoRA"
            )
    p = layer.params(entry, whole=True)
    base = layer.base_affine(whole=True)
    base = base.to(merge_dtype(base.weight.dtype))
    resting = entry.method.resting(entry.site, p, base)
    own = float(entry.options.get("scaling", 1.0)) or 1.0
    for role in dict.fromkeys(role for role, _ in _roles(entry)):
        if role not in entry.method.linear:
            continue
        found = []
        for _, other in held:
            q = layer.params(other, whole=True)
            still = other.method.resting(other.site, q, base).get(role)
            values = getattr(q, role).detach().to(base.weight.dtype)
            change = values if still is None else values - still
            found.append(_placed(p, q, change) * (float(other.options.get("scaling", 1.0)) / own))
        merged = request.rule.merge(found, [weight for weight, _ in held])
        tensor: Tensor = getattr(p, role)
        tensor.copy_(merged + resting[role] if role in resting else merged)
    _put(layer, entry, p)


def _placed(p: P, q: P, change: Tensor) -> Tensor:
    """Return changes of token rows where the new adapter has these tokens; changes of anything else as they are."""
    mine, theirs = p.get("index"), q.get("index")
    if mine is None or theirs is None:
        return change
    rows = change.new_zeros(mine.shape[0], change.shape[1])
    return rows.index_copy(0, (mine == theirs.unsqueeze(1)).int().argmax(dim=1), change)


def _values_of(layer: AdaptedLayer, source: Entry, entry: Entry) -> Entry:
    """Give the new adapter what one of those that it comes from has beside what adds up, and return it."""
    p, q = layer.params(entry, whole=True), layer.params(source, whole=True)
    for role, _ in _roles(entry):
        tensor, value = getattr(p, role), getattr(q, role)
        if role not in entry.method.linear and tensor.shape == value.shape:
            tensor.copy_(value)
    _put(layer, entry, p)
    return entry


def _put(layer: AdaptedLayer, entry: Entry, p: P) -> None:
    """Write whole tensors back, those that layers share too."""
    layer.put(entry, p)
    for role, containers, leaf in entry.shared:
        target = find_tensor(layer.state.shared, entry.name, containers, leaf)
        if is_distributed(target):
            target.copy_(scatter(getattr(p, role), target))
