"""Giving the layers of a LoRA other ranks, with the directions that EVA found as their down-projections."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from inlay.combine.configs import derived
from inlay.combine.placing import plan_exactly
from inlay.core.build import build
from inlay.core.eject import take_out_empty
from inlay.core.entry import Entry
from inlay.core.hanging import dismount
from inlay.core.initial import standing
from inlay.core.inject import mount
from inlay.core.layer import AdaptedLayer
from inlay.core.sliced import own_method
from inlay.errors import CheckpointMismatchError, InlayWarning, UnsupportedError

__all__ = ["place_directions"]

_PREFIX = "base_model.model."


@torch.no_grad()
def place_directions(model: Any, adapter: str, directions: dict[str, Tensor]) -> None:
    """Let A of each layer hold its directions, with as many ranks as there are, and take out layers without any.

    Args:
        model: a ``PeftModel``.
        directions: layer name, with or without the wrapper's prefix -> (rank, fan_in).

    Raises:
        CheckpointMismatchError: directions are of another length than a layer's inputs.
        UnsupportedError: token rows train at one of the layers.
    """
    state, root = model.state, model.get_base_model()
    record = state.records[adapter]
    given = {name.removeprefix(_PREFIX): value for name, value in directions.items()}
    held = _held(root, adapter)
    ranks, alphas, missing, dropped = {}, {}, [], []
    for path, (layer, entry) in held.items():
        r, alpha, found = entry.options["r"], entry.options["lora_alpha"], given.get(path)
        if found is None:
            missing.append(path)
        else:
            _check(path, layer, adapter, entry, found)
            if len(found) == 0:
                dropped.append(layer)
                continue
            if len(found) != r and record.config.eva_config.adjust_scaling_factors:
                share = len(found) / r
                alpha *= math.sqrt(share) if record.config.use_rslora else share
            r = len(found)
        ranks[path], alphas[path] = r, alpha
    config = record.config
    asked = derived(
        config,
        rank_pattern={path: r for path, r in ranks.items() if r != config.r},
        alpha_pattern={path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )
    autocast = all(p.dtype != torch.bfloat16 and p.dtype != torch.float16 for p in _tensors(held))
    made = plan_exactly(root, asked, f"{adapter}_eva", set(ranks), autocast)
    made.adapter = adapter
    own = [placement for placement in made.placements if own_method(placement.method) is made.method]
    built = [(placement, build(made, placement, False, True, record.seed)) for placement in own]
    for placement, tensors in built:
        layer, entry = held[placement.site.name]
        trains = any(p.requires_grad for p, _ in entry.parameters(layer))
        if placement.site.name in given and "A" in tensors:
            tensors["A"].copy_(given[placement.site.name].view(tensors["A"].shape))
        standing_here = standing(placement)
        assert standing_here is layer
        dismount(layer, adapter)
        mount(layer, made, placement, tensors, [], trains)
    for layer in dropped:
        dismount(layer, adapter)
    if dropped:
        take_out_empty(root, state)
    record.method, record.reach = made.method, None
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(config, field, getattr(made.method.config, field))
    config.rank_pattern, config.alpha_pattern = asked.rank_pattern, asked.alpha_pattern
    state.touch()
    if missing:
        warnings.warn(
            f"the following layers were initialized with init_lora_weights=True because they were not found in the eva "
            f"state_dict: {missing}",
            InlayWarning,
            stacklevel=4,
        )


def _held(root: Any, adapter: str) -> dict[str, tuple[AdaptedLayer, Entry]]:
    return {
        entry.site.name: (layer, entry)
        for layer in root.modules()
        if isinstance(layer, AdaptedLayer)
        for entry in layer.entries.get(adapter, ())
        if "r" in entry.options and entry.home is None
    }


def _tensors(held: dict[str, tuple[AdaptedLayer, Entry]]) -> list[Tensor]:
    return [p for layer, entry in held.values() for p, _ in entry.parameters(layer)]


def _check(path: str, layer: AdaptedLayer, adapter: str, entry: Entry, found: Tensor) -> None:
    if len(layer.entries[adapter]) > 1:
        raise UnsupportedError(f"{path!r}: token rows train at this layer, whose rank EVA would change")
    if found.dim() != 2 or found.shape[1] != entry.site.fan_in:
        raise CheckpointMismatchError(
            f"eva_state_dict: {path!r}: expected (rank, {entry.site.fan_in}), found {tuple(found.shape)}"
        )
