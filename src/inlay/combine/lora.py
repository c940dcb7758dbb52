"""Combining LoRA adapters layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.combine.configs import derived, united, united_targets, united_tokens
from inlay.combine.parts import Part, combined, part_of
from inlay.combine.placing import carry, check_tied, entries, layers_of, plan_exactly, put, refuse_parameters
from inlay.combine.rules import Request
from inlay.combine.svd import Factors, resized
from inlay.config.variants import NO_VARIANT
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.plan import Plan
from inlay.core.sliced import Sliced
from inlay.core.state import State
from inlay.errors import CombinationError

__all__ = ["add_lora", "rows_of", "write_factors"]


def add_lora(model: nn.Module, state: State, request: Request) -> None:
    """Combine LoRA adapters into a new one; see :func:`inlay.combine.add_weighted`."""
    configs = [state.record(name).config for name in request.adapters]
    refuse_parameters(state, request.adapters)
    held = [_ranks(model, name) for name in request.adapters]
    ranks = [
        max([config.r, *(config.rank_pattern or {}).values(), *found.values()])
        for config, found in zip(configs, held, strict=True)
    ]
    if request.rule.space == "factors":
        _check_ranks(request, ranks, held)
    rank = {"factors": max(ranks), "cat": sum(ranks), "matrix": request.rank or max(ranks)}[request.rule.space]
    made = _plan(model, state, request, configs, rank)

    def fill(state: State) -> None:
        check_tied(model, request.name, request.adapters)
        for layer in layers_of(model):
            for entry in entries(layer, request.name, "LORA"):
                if entry.home is None:
                    _fill_layer(layer, entry, request)
        carry(model, state, request.name, request.adapters, request.weights)

    put(made, fill)


def _ranks(model: nn.Module, name: str) -> dict[str, int]:
    """Return the rank of an adapter's tensors at each layer, the room for hotswapping included."""
    held = ((layer, entry) for layer in layers_of(model) for entry in entries(layer, name, "LORA"))
    return {entry.site.name: layer.params(entry).A.shape[0] for layer, entry in held}


def _check_ranks(request: Request, ranks: list[int], held: list[dict[str, int]]) -> None:
    """Factors are combined entry by entry, so on every layer they need one shape."""
    places: dict[str, dict[str, int]] = {"": dict(zip(request.adapters, ranks, strict=True))}
    for name, found in zip(request.adapters, held, strict=True):
        for site, rank in found.items():
            places.setdefault(site, {})[name] = rank
    for site, by_name in places.items():
        if len(set(by_name.values())) > 1:
            shown = ", ".join(f"{name!r} has {rank}" for name, rank in by_name.items())
            where = f" at {site!r}" if site else ""
            raise CombinationError(
                f"combination_type={request.rule.name!r} combines factors, which need the same rank, and {shown}{where}"
                "; 'cat' and the types that end in 'svd' take any ranks"
            )


def _plan(model: nn.Module, state: State, request: Request, configs: list[Any], rank: int) -> Plan:
    """Plan the new adapter: the first one's configuration, with a scale of 1 everywhere."""
    first = configs[0]
    dora, bias = (any(getattr(config, field) for config in configs) for field in ("use_dora", "lora_bias"))
    if dora and bias:
        raise CombinationError(
            "some of the adapters use DoRA and others lora_bias, and no LoRA configuration has place for both"
        )
    start = first.init_lora_weights
    config = derived(
        first,
        r=rank,
        lora_alpha=rank,
        target_modules=united_targets(configs, "target_modules"),
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        use_dora=dora,
        lora_bias=bias,
        modules_to_save=united(configs, "modules_to_save"),
        trainable_token_indices=united_tokens(configs),
        init_lora_weights=start if start in (True, False, "gaussian") else True,
        **NO_VARIANT,  # what they come to is two factors
    )
    held = [
        (layer, entry)
        for layer in layers_of(model)
        for name in request.adapters
        for entry in entries(layer, name, "LORA")
    ]
    # adapters of a half-precision model are held in float32, unless these are not
    wide = any(layer.params(entry).A.dtype.itemsize >= 4 for layer, entry in held if entry.home is None)
    return plan_exactly(model, config, request.name, {entry.site.name for _, entry in held}, autocast=wide)


# -- one layer --------------------------------------------------------------------------------------------------------


def _fill_layer(layer: AdaptedLayer, entry: Entry, request: Request) -> None:
    parts = [
        part_of(layer, held, weight)
        for name, weight in zip(request.adapters, request.weights, strict=True)
        for held in entries(layer, name, "LORA")
    ]
    factors = combined(entry.site, parts, request)
    p = write_factors(layer, entry, factors)
    if p.get("bias") is not None:
        zero = p.bias.new_zeros(layer.site.out)
        biases = [zero if part.bias is None else part.bias for part in parts]
        p.bias.copy_(rows_of(entry, request.rule.merge(biases, [part.weight for part in parts])))
    if p.get("magnitude") is not None:
        norm = _row_norms(layer)
        # where an update is plain LoRA, DoRA with the norms of the adapted rows is the same map
        found = [
            _row_norms(layer, part) - norm if part.magnitude is None else part.magnitude.to(norm.dtype) - norm
            for part in parts
        ]
        merged = rows_of(entry, norm + request.rule.merge(found, [part.weight for part in parts]))
        p.magnitude.copy_(merged.view(p.magnitude.shape))
    layer.put(entry, p)


def write_factors(layer: AdaptedLayer, entry: Entry, factors: Factors) -> Any:
    """Write factors into an entry's A and B, with zeros for what its rank has beyond them; returns its tensors."""
    p = layer.params(entry, whole=True)
    B, A = resized(factors, p.A.shape[0] // entry.site.groups)
    B = rows_of(entry, B)
    p.A.copy_(A.reshape(p.A.shape))
    p.B.copy_(B.reshape(p.B.shape))
    layer.put(entry, p)
    return p


def rows_of(entry: Entry, whole: Tensor) -> Tensor:
    """Return the rows that an adapter is on; all that is combined into it lies there."""
    return entry.method.take(whole) if isinstance(entry.method, Sliced) else whole


def _row_norms(layer: AdaptedLayer, part: Part | None = None) -> Tensor:
    """Return the norm of each row of the base weight, (out,), or of the weight that an update makes of it."""
    weight = layer.base_affine(whole=True).weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(dtype)
    if part is not None:
        weight = weight + part.scale * (part.B.to(dtype) @ part.A.to(dtype))
    return torch.linalg.vector_norm(weight, dim=-1)
