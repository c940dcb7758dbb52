"""The weights of a base model on disk: which tensors there are, in which files, and what the model calls them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.config.files import read_json_object
from inlay.core.banks import conversions
from inlay.errors import CheckpointError, CheckpointMissingError

__all__ = ["INDEX", "ModelFiles", "keys_by_name"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class ModelFiles:
    """The weights of a folder: which tensors there are, in which files.

    Attributes:
        shards: files, in their order in the index.
        where: file of each tensor.
        shapes: shape of each tensor.
        index: what the index file holds, None for a single file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] | None = None
        self.where: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        if (folder / INDEX).is_file():
            self.index = read_json_object(folder / INDEX)
            found = self.index.get("weight_map")
            if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
                raise CheckpointError(f"{folder / INDEX}: key 'weight_map': expected a file's name for every tensor")
            for file in found.values():
                if Path(file).name != file or not file.endswith(".safetensors"):
                    raise CheckpointError(f"{folder / INDEX}: expected .safetensors files beside it, found {file!r}")
            self.shards = list(dict.fromkeys(found.values()))
        elif (folder / SINGLE).is_file():
            self.shards = [SINGLE]
        else:
            raise CheckpointMissingError(f"{str(folder)!r}: expected {SINGLE} or {INDEX}, found neither")
        for shard in self.shards:
            with self.open(shard) as file:
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    self.where[key] = shard
                    self.shapes[key] = tuple(file.get_slice(key).get_shape())
        if self.index is not None:
            for key, shard in self.index["weight_map"].items():
                if self.where.get(key) != shard:
                    raise CheckpointError(
                        f"{folder / shard}: expected the tensor {key!r}, which the index says is here"
                    )

    def open(self, shard: str) -> Any:
        """Open a file of tensors for reading them one by one."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / shard
        try:
            return safe_open(path, "pt")
        except FileNotFoundError as error:
            raise CheckpointMissingError(f"{path}: expected a file of tensors, found none.") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: expected a safetensors file, found a damaged one: {error}") from error

    def read(self, key: str) -> Tensor:
        """Return one tensor."""
        with self.open(self.where[key]) as file:
            return file.get_tensor(key)


def keys_by_name(model: nn.Module, shapes: dict[str, torch.Size], files: ModelFiles) -> dict[str, list[str]]:
    """Return the keys of the tensors that transformers would load as one tensor of the model each, by its name."""
    table = conversions(model)
    renamings = [one for one in table if not hasattr(one, "operations")]
    computed = [one for one in table if hasattr(one, "operations")]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, list[str]] = {}
    for key, shape in files.shapes.items():
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        if any(one.rename_source_key(name)[1] is not None for one in computed):
            continue
        forms = [name, prefix + name, name.removeprefix(prefix)] if len(prefix) > 1 else [name]
        match = next((form for form in forms if form in shapes), None)
        if match is not None and tuple(shapes[match]) == shape:
            found.setdefault(match, []).append(key)
    return found
