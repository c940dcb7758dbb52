"""Combining adapters of any methods into one LoRA: what each of them changes, added up and made low-rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from inlay.combine.change import across_groups, change_of, no_lora_at, place_factors
from inlay.combine.configs import united, united_targets, united_tokens
from inlay.combine.lora import rows_of, write_factors
from inlay.combine.parts import Part, combined, matrix, stored
from inlay.combine.placing import carry, entries, layers_of, main_entries, plan_exactly, put, refuse_parameters
from inlay.combine.rules import Request
from inlay.combine.svd import Factors, clamped, factorise, numerical_rank
from inlay.core.affine import LowRank
from inlay.core.layer import AdaptedLayer
from inlay.core.state import State
from inlay.errors import CombinationError, ConfigError, NoCombinationError
from inlay.methods.lora import LoraConfig

__all__ = ["add_as_lora"]

# Factors of one layer's combined update, and its bias.
Made = tuple[Factors, Tensor | None]


def add_as_lora(model: nn.Module, state: State, request: Request) -> None:
    """Combine adapters into a new LoRA; see :func:`inlay.combine.add_weighted`.

    Low-rank updates are put side by side and made orthogonal, so that no matrix of the layer's size is formed; any
    other is decomposed as a whole. Everything is computed before the model is touched.
    """
    refuse_parameters(state, request.adapters)
    layers = [layer for layer in layers_of(model) if any(main_entries(layer, name) for name in request.adapters)]
    for layer in layers:
        for name in request.adapters:
            reason = no_lora_at(layer, name, files=state.policy.peft_layers) if main_entries(layer, name) else None
            if reason is not None:
                raise NoCombinationError(
                    f"{layer.site.name!r}: adapter {name!r} is of {_method(state, name)} and cannot be combined into a "
                    f"LoRA there: {reason}"
                )
    made = {layer.site.name: _made(layer, request, state) for layer in layers}
    common = math.lcm(*(layer.site.groups for layer in layers))
    widest = max(A.shape[-2] * layer.site.groups for layer, ((_, A), _) in zip(layers, made.values(), strict=True))
    rank = request.rank or math.ceil(widest / common) * common
    config = _config(state, request, set(made), rank, any(bias is not None for _, bias in made.values()))
    dtypes = [p.dtype for layer in layers for name in request.adapters for p in _parameters(layer, name)]
    wide = any(dtype.itemsize >= 4 for dtype in dtypes)
    plan = plan_exactly(model, config, request.name, set(made), autocast=wide)

    def fill(state: State) -> None:
        for layer in layers_of(model):
            for entry in entries(layer, request.name, "LORA"):
                factors, bias = made[entry.site.name]
                p = write_factors(layer, entry, factors)
                if bias is not None:
                    p.bias.copy_(rows_of(entry, bias))
                    layer.put(entry, p)
        carry(model, state, request.name, request.adapters, request.weights)

    put(plan, fill)


def _method(state: State, name: str) -> str:
    kind = state.record(name).config.peft_type
    return str(getattr(kind, "value", kind))


def _parameters(layer: AdaptedLayer, name: str) -> list[Tensor]:
    return [tensor for entry in main_entries(layer, name) for tensor, _ in entry.parameters(layer)]


def _config(state: State, request: Request, wanted: set[str], rank: int, bias: bool) -> LoraConfig:
    """Return a configuration of a LoRA with a scale of 1 on the layers of all the adapters."""
    configs = [state.record(name).config for name in request.adapters]
    fields = ("fan_in_fan_out", "task_type", "base_model_name_or_path", "revision")
    kept = {field: value for field in fields if (value := getattr(configs[0], field, None)) is not None}
    try:
        targets: Any = united_targets(configs, "target_modules")
    except CombinationError:  # names and expressions of different methods
        targets = wanted
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        lora_bias=bias,
        modules_to_save=united(configs, "modules_to_save"),
        trainable_token_indices=united_tokens(configs),
        **kept,
    )


# -- one layer --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _made(layer: AdaptedLayer, request: Request, state: State) -> Made:
    """Return the combined update of one layer, with groups as a leading axis where a convolution has any."""
    held = [(name, w) for name, w in zip(request.adapters, request.weights, strict=True) if main_entries(layer, name)]
    weights = [weight for _, weight in held]
    low = [_low_rank(layer, name, weight) for name, weight in held]
    parts = [part for part in low if part is not None]
    if len(parts) == len(held):
        if all(part.bias is None for part in parts):
            return combined(layer.site, parts, request), None
        biases = [_bias(layer, part.bias) for part in parts]
        return combined(layer.site, parts, request), request.rule.merge(biases, weights)
    if request.rule.space == "matrix" and request.rank is None:
        name = next(name for (name, _), part in zip(held, low, strict=True) if part is None)
        raise ConfigError(
            f"svd_rank: expected a rank, found None: adapter {name!r} is of {_method(state, name)}, whose update has "
            "no rank of its own; combination_type='cat' takes as many as the sum needs"
        )
    return _decomposed(layer, request, [change_of(layer, name, main_entries(layer, name)) for name, _ in held], weights)


def _low_rank(layer: AdaptedLayer, name: str, weight: float) -> Part | None:
    """Return what an adapter has at a layer where that is low-rank without looking at the weight, or None."""
    held = main_entries(layer, name)
    if len(held) != 1 or not held[0].method.additive or layer.site.groups > 1:
        return None
    update = held[0].method.update(held[0].site, layer.params(held[0], whole=True))
    if not isinstance(update, LowRank) or update.A.shape[-2] > min(layer.site.out, layer.site.fan_in):
        return None
    bias = None if update.bias is None else update.bias * update.scale
    return Part(weight, 1.0, update.B * update.scale, update.A, bias, None)


def _decomposed(
    layer: AdaptedLayer, request: Request, changes: list[tuple[Tensor, Tensor | None]], weights: list[float]
) -> Made:
    site, rule = layer.site, request.rule
    crossing = next((change for change, _ in changes if change.dim() > 2), None)
    found = [change if crossing is None else across_groups(site, change, crossing) for change, _ in changes]
    if crossing is None and site.groups > 1:  # each group has its own matrix
        found = [change.unflatten(0, (site.groups, -1)) for change in found]
    update = matrix(site, rule.merge([stored(site, change) for change in found], weights))
    most = min(update.shape[-2:])
    rank = most if rule.space == "cat" or request.rank is None else request.rank // site.groups
    U, S, Vh = factorise(update, min(rank, most), request.driver)
    if rule.space == "cat":
        n = numerical_rank(S, update.shape)
        U, S, Vh = U[..., :n], S[..., :n], Vh[..., :n, :]
    B, A = clamped((U * S.unsqueeze(-2), Vh), request.clamp)
    if site.groups > 1:  # LoRA's A reads every group's channels
        flat, up = place_factors(site, (B, A))
        B, A = (factor.flatten(1).unflatten(0, (site.groups, -1)) for factor in (up, flat))
    if all(bias is None for _, bias in changes):
        return (B, A), None
    return (B, A), rule.merge([_bias(layer, bias) for _, bias in changes], weights)


def _bias(layer: AdaptedLayer, bias: Tensor | None) -> Tensor:
    return layer.base_affine(whole=True).weight.new_zeros(layer.site.out) if bias is None else bias
