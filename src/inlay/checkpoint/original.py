"""Saving an adapter whose start changed the base weights as an ordinary LoRA over the original ones."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inlay.checkpoint.files import load_adapter_files
from inlay.checkpoint.keys import key_index
from inlay.checkpoint.tree import MODEL_PREFIX, Tree
from inlay.core.slot import Slot
from inlay.errors import CheckpointMismatchError, InlayWarning, UnsupportedError, did_you_mean

__all__ = ["over_original", "over_original_config", "subtracted", "warn_tied_to_base"]


def over_original(
    tree: Tree, adapter: str, tensors: Mapping[str, Tensor], folder: str | os.PathLike[str]
) -> dict[str, Tensor]:
    """Return an adapter's tensors as those of a LoRA of twice the rank over the weights before its start.

    The start took ``s B0 A0`` out of W, so that ``W - s B0 A0 + s B A = W + s [B, -B0] [A; A0]``. What does not have a
    rank (a magnitude, a bias, full copies) stays.

    Args:
        tree: the model.
        adapter: its name.
        tensors: what would be saved.
        folder: where the adapter was saved before it was trained.

    Raises:
        UnsupportedError: the adapter is no LoRA.
        CheckpointMismatchError: the folder holds an adapter of other layers or ranks.
    """
    config = tree.state.record(adapter).config
    if not hasattr(config, "init_lora_weights"):
        raise UnsupportedError(
            f"path_initial_model_for_weight_conversion: {adapter!r} is a {config.peft_type.value} adapter, and the "
            "conversion is for LoRA, whose starts change base weights"
        )
    if config.kasa_config is not None:
        raise UnsupportedError(
            f"path_initial_model_for_weight_conversion: {adapter!r} has kasa_config, and the singular directions that "
            "it took out of the weights are not among its tensors; inlay.convert_to_lora counts them"
        )
    start = tree.state.record(adapter).method.start  # type: ignore[attr-defined]  # a LoRA
    if not start.changes_base and config.init_lora_weights is not True:
        warnings.warn(
            f"path_initial_model_for_weight_conversion: {adapter!r} starts with {config.init_lora_weights!r}, which "
            "changes no base weights, so there is nothing to be converted",
            InlayWarning,
            stacklevel=5,
        )
    _, initial = load_adapter_files(folder)
    of_training = (".lora_velora_embed", ".lora_monteclora_sampler.")  # which ends with the conversion
    tensors = {key: value for key, value in tensors.items() if not any(part in key for part in of_training)}
    return subtracted(tree, adapter, tensors, initial, os.fspath(folder))


def subtracted(
    tree: Tree, adapter: str, tensors: Mapping[str, Tensor], initial: Mapping[str, Tensor], source: str
) -> dict[str, Tensor]:
    """Return tensors with those that an adapter started with taken out, which doubles the rank.

    Args:
        adapter: an adapter of the model that has these tensors.
        tensors, initial: by their names in a checkpoint.
        source: where ``initial`` is from, for errors.

    Raises:
        CheckpointMismatchError: the two are of different layers or ranks.
    """
    made = dict(tensors)
    given = {name.removeprefix(MODEL_PREFIX): name for name in made}
    initial = {name.removeprefix(MODEL_PREFIX): value for name, value in initial.items()}
    for name, target in key_index(tree, adapter).saved().items():
        slot, plain = target.slot, name.removeprefix(MODEL_PREFIX)
        key = given.get(plain, name)
        if target.part != "slot" or slot is None or "r" not in slot.dims or key not in made:
            continue
        first = initial.get(plain)
        if first is None or first.shape != made[key].shape:
            found = "no such key" if first is None else f"shape {tuple(first.shape)}"
            raise CheckpointMismatchError(
                f"{source}: {key!r}: expected the value of shape {tuple(made[key].shape)} that the adapter "
                f"started with, found {found}.{did_you_mean(plain, initial) if first is None else ''}"
            )
        made[key] = _joined(slot, made[key], first.to(made[key]))
    return made


def _joined(slot: Slot, now: Tensor, first: Tensor) -> Tensor:
    """Join two values of a slot along the rank axis, within each of its blocks; up-projections subtract."""
    axis = slot.dims.index("r")
    if slot.key.split(".")[0].endswith("_B"):
        first = -first
    parts = [tensor.unflatten(axis, (slot.blocks, -1)) for tensor in (now, first)]
    return torch.cat(parts, axis + 1).flatten(axis, axis + 1).contiguous()


def over_original_config(config: Any) -> Any:
    """Return the configuration of what :func:`over_original` makes: twice the rank, the same scale."""
    made = copy.deepcopy(config)
    factor = 2**0.5 if made.use_rslora else 2
    made.init_lora_weights = True
    made.velora_config = made.monteclora_config = None
    made.loftq_config, made.eva_config, made.corda_config, made.lora_ga_config = {}, None, None, None
    made.r, made.lora_alpha = 2 * made.r, factor * made.lora_alpha
    made.rank_pattern = {key: 2 * r for key, r in (made.rank_pattern or {}).items()}
    made.alpha_pattern = {key: factor * alpha for key, alpha in (made.alpha_pattern or {}).items()}
    return made


def warn_tied_to_base(tree: Tree, adapter: str) -> None:
    """Say so where a saved adapter cannot be loaded again without what was measured for its start."""
    record = tree.state.record(adapter)
    if record.rebased and record.method.measured:
        warnings.warn(
            f"adapter {adapter!r} was trained over base weights that its start "
            f"({record.config.init_lora_weights!r}) changed with what it measured; save it with "
            "path_initial_model_for_weight_conversion=<folder of the untrained adapter>, or save the base model too",
            InlayWarning,
            stacklevel=4,
        )
