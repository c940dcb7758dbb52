"""Merging on disk: a base model's folder and an adapter's become a merged one, with one shard in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.checkpoint.commit import Commit
from inlay.checkpoint.files import load_adapter_files
from inlay.checkpoint.manifest import read_manifest, restore
from inlay.checkpoint.merged import Change, changes, merged_value
from inlay.checkpoint.model_files import INDEX, ModelFiles, keys_by_name
from inlay.checkpoint.state_dict import load_tensors
from inlay.checkpoint.tree import Tree
from inlay.config.files import read_json_object
from inlay.core.inject import inject
from inlay.core.merge_rows import low_rank_updates
from inlay.core.plan import plan
from inlay.core.state import State
from inlay.errors import CheckpointError, ConfigTypeError, UnsupportedError, did_you_mean
from inlay.models.skeleton import skeleton

__all__ = ["merge_checkpoint"]

CONFIG = "config.json"
# Files of a model's folder that hold weights in some form; every other one goes into the merged folder as it is.
_WEIGHTS = (
    *(".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json"),
    *(".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"),
)


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    adapters: str | list[str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a base model with adapters merged into it, shard by shard, without ever having the model in memory.

    The model is built from its ``config.json`` on the meta device, to find out what the adapter changes. Each file of
    weights is then read, changed where it has to be, and written under its own name; everything else in the folder is
    copied. The files take their places in ``out`` together when all are complete, so a merge that fails leaves
    nothing. A tensor's name in the files is mapped to the model's by transformers' own renamings and by the prefix of
    the model without its head; a tensor that transformers would compute from others (stacked experts of an older
    checkpoint) has no such name, and an adapter that changes it is refused.

    Args:
        base: folder of a model of transformers with ``config.json`` and safetensors files.
        adapter: folder that ``save_pretrained`` wrote.
        out: new or empty folder.
        adapters: name or names of those to merge, where the folder has several; by default the active ones.
        dtype: of the floating tensors; by default each keeps its own. Merged ones are rounded once.

    Raises:
        CheckpointMissingError: a folder or file that is not there.
        CheckpointError: a file is damaged, ``out`` is not empty, or the base has no tensor that the adapter changes.
        UnsupportedError: the base is quantised, or transformers does not know the model.
        MergeError: the adapter cannot be merged, or a merged weight would not be finite.
        MissingExtraError: transformers is not installed.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ConfigTypeError(f"dtype: expected a floating dtype such as torch.bfloat16, found {dtype}")
    base, out = Path(base), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{str(out)!r}: expected a new or empty folder to write the merged model to")
    config = read_json_object(base / CONFIG)
    if config.get("quantization_config"):
        raise UnsupportedError(f"{str(base)!r} holds a quantised model, whose shards cannot be merged one by one")
    files = ModelFiles(base)
    tree, shared = _adapted(base, Path(adapter))
    names = list(tree.state.active) if adapters is None else [adapters] if isinstance(adapters, str) else list(adapters)
    work = _Work(tree, names, files, shared)
    with Commit() as commit:
        sizes = [work.write(shard, commit.stage(out / shard), dtype) for shard in files.shards]
        if files.index is not None:
            metadata = {**files.index.get("metadata", {}), "total_size": sum(sizes)}
            commit.stage_text(out / INDEX, json.dumps({**files.index, "metadata": metadata}, indent=2) + "\n")
        for path in sorted(base.iterdir()):
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHTS):
                if path.name == CONFIG and dtype is not None:
                    key = "torch_dtype" if "torch_dtype" in config else "dtype"
                    config[key] = str(dtype).removeprefix("torch.")
                    commit.stage_text(out / CONFIG, json.dumps(config, indent=2) + "\n")
                else:
                    shutil.copyfile(path, commit.stage(out / path.name))


def _adapted(base: Path, adapter: Path) -> tuple[Tree, dict[str, list[str]]]:
    """Return the base model on the meta device with the adapters of a folder, whose values are on the CPU.

    Base tensors that the adapter's file holds (trained biases, embeddings) are not on the meta device any more. The
    second result has, for each parameter, the names that share it.
    """
    manifest = read_manifest(adapter)
    held = {name: load_adapter_files(adapter, folder or None) for name, folder in manifest.folders.items()}
    task = next((getattr(config, "task_type", None) for config, _ in held.values()), None)
    model = skeleton(str(base), task)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, (config, tensors) in held.items():
        config.inference_mode = True
        made = plan(model, config, name, held=tensors)
        for placement in made.placements:
            placement.device = torch.device("cpu")  # tensors that no file holds are made here

        def fill(state: State, name: str = name, tensors: Any = tensors, version: Any = config.peft_version) -> None:
            load_tensors(model, tensors, name, source=str(adapter), version=version)

        inject(made, low_memory=True, initialise=False, then=fill)
    tree = Tree(model)
    restore(tree, manifest)
    return tree, {name: names for names in owners.values() for name in names}


class _Work:
    """What the adapters change, by the names that the files have for it."""

    def __init__(self, tree: Tree, names: list[str], files: ModelFiles, shared: dict[str, list[str]]) -> None:
        self.files = files
        self.changed: dict[str, tuple[str, Change]] = {}  # key in the files -> name in the model, change
        self._all = dict(changes(tree, names))
        self._shared = shared
        self._keys = keys_by_name(tree.bare, {name: _shape(change) for name, change in self._all.items()}, files)
        self._check_ties()
        wanted = [name for name, change in self._all.items() if _changes(change) or self._brought(name) is not None]
        for name in wanted:
            if name in self._keys:
                self.changed[self._key(name)] = name, self._all[name]
            elif not any(other in self._keys for other in shared.get(name, ())):  # it may be stored under another name
                near = did_you_mean(name, files.where)
                raise CheckpointError(
                    f"{str(files.folder)!r} has no tensor of shape {tuple(_shape(self._all[name]))} that transformers "
                    f"would load as {name!r} alone, and the adapter changes it; merge with the model in memory.{near}"
                )

    def _brought(self, name: str) -> Tensor | None:
        """Return the value that the adapter's file has for a base parameter."""
        for other in self._shared.get(name, ()):
            change = self._all[other]
            if change.original is None and not change.held.is_meta:
                return change.held
        return None

    def _check_ties(self) -> None:
        """Refuse a full copy of one of several modules that share a weight: the files hold that weight once."""
        for names in self._shared.values():
            copies = {id(self._all[name].held) for name in names if self._all[name].original is not None}
            if copies and (len(copies) > 1 or any(self._all[name].original is None for name in names)):
                raise UnsupportedError(
                    f"{' and '.join(map(repr, names))} share one weight in the base model, and the adapter trains a "
                    "copy for one of them only, which a checkpoint of a tied model cannot hold; merge with the model "
                    "in memory"
                )

    def _key(self, name: str) -> str:
        """Return the one key of a tensor of the model."""
        keys = self._keys.get(name, [])
        if not keys:
            raise CheckpointError(f"{str(self.files.folder)!r} has no tensor that transformers would load as {name!r}")
        if len(keys) > 1:
            raise CheckpointError(f"{str(self.files.folder)!r}: {' and '.join(map(repr, keys))} both mean {name!r}")
        return keys[0]

    def write(self, shard: str, path: Path, dtype: torch.dtype | None) -> int:
        """Write one file and return the bytes of its tensors."""
        from safetensors.torch import save_file

        with self.files.open(shard) as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for key, tensor in tensors.items():
            if key in self.changed:
                tensors[key] = self._merged(*self.changed[key], tensor, dtype)
            elif dtype is not None and tensor.is_floating_point():
                tensors[key] = tensor.to(dtype)
        save_file(tensors, path, metadata)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _merged(self, name: str, change: Change, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Return what a tensor of a file becomes."""
        dtype = dtype or tensor.dtype
        if change.original is not None:  # a full copy, which may train in a wider dtype than the base is stored in
            return merged_value(name, change, dtype).contiguous()
        brought = self._brought(name)
        value = tensor if brought is None else brought.detach().to(tensor.dtype)
        if change.plan is None:
            return value.to(dtype).contiguous()
        layer = change.plan.layer
        leaf, weight = layer.leaf_layer, layer.kind.weight_name
        owner = name.removesuffix(change.attribute)
        needed = {change.attribute: value}
        if low_rank_updates(layer, change.plan.chain) is None:
            for other in (weight, *([layer.kind.bias_name] if layer.site.bias else [])):
                if other not in needed:
                    brought = self._brought(owner + other)
                    needed[other] = self.files.read(self._key(owner + other)) if brought is None else brought.detach()
        held = {attribute: leaf._parameters[attribute] for attribute in needed}
        try:
            for attribute, now in needed.items():
                leaf._parameters[attribute] = nn.Parameter(now, requires_grad=False)
            if change.attribute != weight and weight in needed:  # it is computed along with the weight
                merged_value(owner + weight, replace(change, attribute=weight), None)
            return merged_value(name, change, dtype)
        finally:
            change.plan.waiting.clear()
            leaf._parameters.update(held)


def _changes(change: Change) -> bool:
    """Whether a tensor is another one in the merged model."""
    if change.plan is None:
        return change.original is not None
    layer = change.plan.layer
    return change.attribute == layer.kind.weight_name or low_rank_updates(layer, change.plan.chain) is None


def _shape(change: Change) -> torch.Size:
    return (change.held if change.original is None else change.original).shape
