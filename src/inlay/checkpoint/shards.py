"""Adapters in several files: what ``save_pretrained`` of transformers writes above ``max_shard_size``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inlay.config import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, resolve_file
from inlay.config.files import read_json_object
from inlay.errors import CheckpointError, CheckpointMissingError

__all__ = ["INDEX_NAMES", "index_file", "shards_of"]

# transformers splits the adapter's file and gives the index the name that a model's has
INDEX_NAMES = (
    f"{SAFETENSORS_WEIGHTS_NAME}.index.json",
    f"{WEIGHTS_NAME}.index.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
_STEMS = tuple(name.rpartition(".")[0] for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))


def index_file(find: Callable[[str], str]) -> tuple[str, dict[str, str]] | None:
    """Return an adapter's index file and its map of keys to files, or None where there is none.

    Args:
        find: name of a file -> its local path; raises `CheckpointMissingError` for a file that is not there.

    Raises:
        CheckpointError: the index cannot be read, or names files outside of its folder.
    """
    for name in INDEX_NAMES:
        try:
            path = find(name)
        except CheckpointMissingError:
            continue
        found = read_json_object(path).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
            raise CheckpointError(f"{path}: key 'weight_map': expected a file's name for every tensor")
        for file in found.values():
            if Path(file).name != file or not file.endswith((".safetensors", ".bin")):
                raise CheckpointError(f"{path}: expected names of .safetensors or .bin files beside it, found {file!r}")
        if found and all(file.startswith(_STEMS) for file in found.values()):
            return path, found  # otherwise it is the base model's
    return None


def shards_of(
    folder_or_repo: str | os.PathLike[str], subfolder: str | None, **hub_keywords: Any
) -> dict[str, str] | None:
    """Return the local path of the file of every tensor, or None where the adapter has no index.

    Raises:
        CheckpointError: the index is damaged.
        CheckpointMissingError: a file that it names is not there.
    """

    def find(name: str) -> str:
        return resolve_file(folder_or_repo, name, subfolder, **hub_keywords)

    found = index_file(find)
    if found is None:
        return None
    paths = {file: find(file) for file in sorted(set(found[1].values()))}
    return {key: paths[file] for key, file in found[1].items()}
