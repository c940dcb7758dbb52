"""An adapter of any method as a LoRA: the best approximation of each layer's change."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.commit import Commit
from inlay.checkpoint.keys import key_index
from inlay.checkpoint.save import write_tensors
from inlay.checkpoint.tree import MODEL_PREFIX, Node, Tree, bare_model
from inlay.combine.change import across_groups, change_of, lora_factors, no_lora_at
from inlay.combine.placing import targets_exactly
from inlay.config import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from inlay.core.fused_layouts import bare_name
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.core.progress import shown
from inlay.core.rebase import base_change
from inlay.core.state import find_state
from inlay.errors import CheckpointError, ConfigError, ConfigTypeError, ConversionError, InlayWarning
from inlay.methods.lora import LoraConfig

__all__ = ["convert_to_lora", "save_as_lora"]


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Approximate an adapter by a LoRA, layer by layer, with a scale of 1; the model stays as it is.

    The change of each layer's weight is decomposed and cut off: no LoRA of that rank is nearer to it. Linear layers,
    convolutions and embeddings of every method that can be merged are converted, biases and full copies of modules
    (``modules_to_save``) included.

    Args:
        model: a model with adapters, wrapped or bare.
        rank: the rank of every layer, or a share in (0, 1]: the smallest rank of each layer whose singular values
            hold that share of the sum of squares.
        adapter_name: which adapter.
        progressbar: show how far it is.
        compile_kwargs: compile the decomposition with these arguments of ``torch.compile``.

    Returns:
        The LoRA's configuration, and its tensors by the keys that a checkpoint of this model has.

    Raises:
        ConversionError: no layer, or one that no LoRA can stand for.
        ConfigError, ConfigTypeError: a rank that is none, or more than a layer has; or an adapter that trains biases
            of the base model.
        UnknownAdapterError: no adapter of that name.
    """
    _check_rank(rank)
    if find_state(bare_model(model)[0]) is None:
        raise ConversionError(f"{type(model).__name__} has no adapters, so there is nothing to convert to LoRA")
    tree = Tree(model)
    record = tree.state.record(adapter_name)
    layers = _layers(tree, adapter_name)
    if record.config.peft_type == PeftType.LORA:
        warnings.warn(
            f"adapter {adapter_name!r} is a LoRA already; converting it loses what the rank cuts off",
            InlayWarning,
            stacklevel=2,
        )
    if record.method.bias_mode() != "none":
        raise ConfigError(
            f"adapter {adapter_name!r} trains biases of the base model (bias={record.method.bias_mode()!r}), which a "
            "conversion leaves out; it needs bias='none'"
        )
    decompose: Callable[..., tuple[Tensor, Tensor]] = lora_factors
    if compile_kwargs is not None:
        decompose = torch.compile(lora_factors, **compile_kwargs)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    biases: dict[str, Tensor] = {}
    for node, layer in shown(layers, "Converting to LoRA", on=progressbar):
        above = f"{MODEL_PREFIX}{node.path}"
        change, bias = change_of(layer, adapter_name)
        shift = base_change(layer, adapter_name)  # the result is for the base before the adapter's start changed it
        if shift is not None:
            change = change + across_groups(layer.site, shift, change)
        A, B = decompose(layer.site, change, rank)
        if change.dim() == 2:
            B[~change.any(dim=-1)] = 0.0  # exactly, where nothing changed: outside of a slice
        keys = ("lora_embedding_A", "lora_embedding_B") if layer.site.lookup else ("lora_A.weight", "lora_B.weight")
        dtype = _dtype(layer, adapter_name, change)
        for key, tensor in zip(keys, (A, B), strict=True):
            tensors[f"{above}.{key}"] = tensor.to(dtype)
        ranks[layer.site.name] = A.shape[0]
        if bias is not None:
            biases[f"{above}.lora_B.bias"] = bias.to(dtype)
    if biases:  # then every layer has one
        for node, layer in layers:
            if layer.site.lookup:
                raise ConversionError(
                    f"{layer.site.name!r} is an embedding, and adapter {adapter_name!r} changes biases of other "
                    "layers: in a LoRA either all layers have a bias or none, and an embedding has none"
                )
            key = f"{MODEL_PREFIX}{node.path}.lora_B"
            tensors[f"{key}.bias"] = biases.get(f"{key}.bias", tensors[f"{key}.weight"].new_zeros(layer.site.out))
    copies = [target for target in key_index(tree, adapter_name).targets.values() if target.part == "copy"]
    tensors |= {target.key: target.whole(target.tensor) for target in copies}
    if not tree.wrapped:
        tensors = {key.removeprefix(MODEL_PREFIX): tensor for key, tensor in tensors.items()}
    return _config(tree, adapter_name, rank, ranks, bool(biases)), tensors


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Convert an adapter with :func:`convert_to_lora` and write it to a folder, which loads as any LoRA does.

    Args:
        path: the folder; made where needed. A LoRA that is there is replaced, whole or not at all.
        others: see :func:`convert_to_lora`.

    Raises:
        CheckpointError: ``path`` is a file.
        what :func:`convert_to_lora` raises; nothing is written then.
    """
    if os.path.isfile(path):
        raise CheckpointError(f"Expected a folder to save into, found the file {os.fspath(path)!r}.")
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    config.inference_mode = True
    # files hold the keys of a wrapped model, whatever this one is
    named = {key if key.startswith(MODEL_PREFIX) else f"{MODEL_PREFIX}{key}": value for key, value in tensors.items()}
    folder = Path(path)
    with Commit() as commit:
        write_tensors(named, commit.stage(folder / SAFETENSORS_WEIGHTS_NAME), safe=True)
        commit.stage_removal(folder / WEIGHTS_NAME)
        commit.stage_text(folder / CONFIG_NAME, config.to_json())


def _check_rank(rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ConfigTypeError(f"rank: expected a whole number or a share from 0 to 1, found {rank!r}")
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ConfigError(f"rank: a float is the share of energy to keep and lies above 0 and up to 1, found {rank}")
    if rank < 1 and isinstance(rank, int):
        raise ConfigError(f"rank: expected a whole number above 0, found {rank}")


def _layers(tree: Tree, name: str) -> list[tuple[Node, AdaptedLayer]]:
    """Return the adapter's layers, all of which can be converted."""
    found = [
        (node, node.module)
        for node in tree.nodes
        if isinstance(node.module, AdaptedLayer) and name in node.module.entries
    ]
    for layer in tree.state.layers():
        if not isinstance(layer, (AdaptedLayer, ModuleCopies)) and layer.has(name):
            raise ConversionError(
                f"{layer.site_path!r} ({layer.type_name}) is a layer of one's own, and nobody says what "
                f"adapter {name!r} changes there"
            )
    if not found:
        raise ConversionError(f"adapter {name!r} has no layer whose change could be converted to LoRA")
    for _, layer in found:
        reason = no_lora_at(layer, name)
        if reason is not None:
            raise ConversionError(f"{layer.site.name!r}: adapter {name!r} cannot become a LoRA there: {reason}")
    return found


def _dtype(layer: AdaptedLayer, name: str, change: Tensor) -> torch.dtype:
    """Return the dtype of an adapter's own tensors at a layer."""
    return next((p.dtype for entry in layer.entries[name] for p, _ in entry.parameters(layer)), change.dtype)


def _config(tree: Tree, name: str, rank: float, ranks: dict[str, int], with_bias: bool) -> LoraConfig:
    """Return a configuration that means these layers with these ranks, each with a scale of 1."""
    old = tree.state.record(name).config
    usual = rank if isinstance(rank, int) else 1
    fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    kept = ("fan_in_fan_out", "task_type", "base_model_name_or_path", "revision")
    pattern = {_exactly(path, ranks): r for path, r in ranks.items() if r != usual}
    given: dict[str, Any] = {name: copy.deepcopy(getattr(old, name, None)) for name in (*fields, *kept)}
    targets = given["target_modules"]
    if targets is not None and not isinstance(targets, str):
        given["target_modules"] = {bare_name(target) for target in targets}  # rows outside of a slice are zeros
    config = LoraConfig(
        r=usual,
        lora_alpha=usual,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_bias=with_bias,
        **{name: value for name, value in given.items() if value is not None},
    )
    return targets_exactly(tree.bare, tree.state, config, set(ranks))


def _exactly(path: str, paths: Iterable[str]) -> str:
    """Return a pattern for one path, anchored where it is also the ending of another one."""
    return f"^{re.escape(path)}" if any(other.endswith(f".{path}") for other in paths) else path
