"""Writing adapters to a folder, in PEFT's layout."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.card import model_card
from inlay.checkpoint.commit import Commit
from inlay.checkpoint.manifest import MANIFEST_NAME, adapter_folder, taken_from
from inlay.checkpoint.original import over_original, over_original_config, warn_tied_to_base
from inlay.checkpoint.state_dict import saved_tensors
from inlay.checkpoint.stored import storable, store
from inlay.checkpoint.tree import Tree
from inlay.config import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from inlay.core.state import check_adapter_name
from inlay.errors import CheckpointError

__all__ = ["save_adapters", "write_tensors"]


def save_adapters(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    *,
    safe_serialization: bool = True,
    selected_adapters: Iterable[str] | None = None,
    save_embedding_layers: bool | str = "auto",
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    initial: str | os.PathLike[str] | None = None,
) -> None:
    """Write adapters to a folder: ``default`` at its root, others in sub-folders of their names.

    Every adapter gets ``adapter_model.safetensors`` and ``adapter_config.json``; the root gets a model card, which is
    brought up to date if there is one, and ``inlay.json``, which records order, active adapters and changed numbers.
    New files take their places when all are written, so a save that fails leaves the old ones.

    Args:
        model: a ``PeftModel``, or a model with injected adapters.
        save_directory: the folder; made where needed.
        safe_serialization: False writes ``adapter_model.bin`` instead.
        selected_adapters: names of those to save; by default all.
        save_embedding_layers: see :func:`get_peft_model_state_dict`.
        is_main_process: False writes nothing. Every process must call this where tensors are sharded.
        state_dict: values to save instead of the model's own; see :func:`get_peft_model_state_dict`.
        initial: folder where the adapter was saved before it was trained: it is then saved as an ordinary LoRA over
            the base weights as they were before its start changed them; see ``checkpoint.original``.

    Raises:
        StateError: the model has no adapters.
        UnknownAdapterError: a selected adapter is not there.
        AdapterNameError: an adapter's name cannot be that of a folder.
        CheckpointError: ``save_directory`` is a file, or a tensor cannot be saved whole.
        ConfigError: a configuration holds something that its file cannot.
    """
    if os.path.isfile(save_directory):
        raise CheckpointError(f"Expected a folder to save into, found the file {os.fspath(save_directory)!r}.")
    tree = Tree(model)
    everything = (name for name, record in tree.state.records.items() if not record.slot)
    names = list(everything if selected_adapters is None else selected_adapters)
    for name in names:
        tree.state.record(name)
        check_adapter_name(name)
    tensors = {
        name: saved_tensors(tree, name, state_dict, save_embedding_layers=save_embedding_layers) for name in names
    }
    for name in names:
        if initial is None:
            warn_tied_to_base(tree, name)
        else:
            tensors[name] = over_original(tree, name, tensors[name], initial)
    if not is_main_process:
        return
    root = Path(save_directory)
    configs = {name: saved_config(tree, name) for name in names}
    if initial is not None:
        configs = {name: over_original_config(config) for name, config in configs.items()}
    weights, other = SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
    if not safe_serialization:
        weights, other = other, weights
    with Commit() as commit:
        for name in names:
            folder = root / adapter_folder(name)
            write_tensors(tensors[name], commit.stage(folder / weights), safe_serialization)
            commit.stage_removal(folder / other)  # a reader would take the old one
            commit.stage_text(folder / CONFIG_NAME, configs[name].to_json())
        card = root / "README.md"
        existing = card.read_text(encoding="utf-8") if card.is_file() else None
        commit.stage_text(card, model_card(tree.bare, configs, existing))
        commit.stage_text(root / MANIFEST_NAME, taken_from(tree, names).to_json())


def saved_config(tree: Tree, name: str) -> Any:
    """Return a copy of an adapter's configuration as it is written: for inference, with what can be filled in."""
    record = tree.state.record(name)
    config = copy.deepcopy(record.config)
    for field, value in record.saved.items():
        setattr(config, field, copy.deepcopy(value))
    config.inference_mode = True
    config.peft_version = config.written_version
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = tree.bare.__dict__.get("name_or_path") or None
    if config.task_type is None:
        cls = type(tree.bare)
        if any(base.__name__ == "FSDPModule" for base in cls.__bases__):  # fully_shard makes a class on top
            cls = cls.__bases__[-1]
        config.auto_mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    return config


def write_tensors(tensors: Mapping[str, Tensor], path: Path, safe: bool) -> None:
    """Write tensors each in full, also where they are views or aliases of each other."""
    if safe and storable(tensors):
        store(tensors, path)
        return
    seen: set[tuple[torch.device, int]] = set()
    own: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        place = (tensor.device, storage.data_ptr())
        alone = place not in seen and storage.nbytes() == tensor.nbytes
        seen.add(place)
        own[key] = tensor.contiguous() if alone else tensor.clone(memory_format=torch.contiguous_format)
    if safe:
        from safetensors.torch import save_file

        save_file(own, path, metadata={"format": "pt"})
    else:
        torch.save(own, path)
