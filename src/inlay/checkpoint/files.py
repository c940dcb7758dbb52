"""Reading adapter files: from a folder, or from the Hub when they are not there."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inlay.checkpoint.mapped import mapped_tensors
from inlay.checkpoint.shards import shards_of
from inlay.config import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftConfig, resolve_file
from inlay.errors import CheckpointError, CheckpointMissingError

__all__ = ["load_adapter_files", "load_peft_weights", "read_tensors", "weights_file"]


def load_adapter_files(
    folder_or_repo: str | os.PathLike[str],
    subfolder: str | None = None,
    *,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub_keywords: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Return an adapter's configuration and its tensors.

    Args:
        folder_or_repo: local folder or Hub repository.
        subfolder: a folder inside it.
        device: where the tensors go; by default they are mapped into memory on the CPU.
        key_mapping: see :func:`load_peft_weights`.
        hub_keywords: revision, token, cache_dir, ... of ``huggingface_hub.hf_hub_download``.

    Raises:
        CheckpointMissingError: configuration or weights are not there.
        CheckpointError: a file is damaged, or a save into the folder was cut off.
        ConfigError: the configuration has an unknown method or a wrong value.
    """
    config = PeftConfig.from_pretrained(folder_or_repo, subfolder=subfolder, **hub_keywords)
    keywords = hub_keywords if subfolder is None else {**hub_keywords, "subfolder": subfolder}
    return config, load_peft_weights(os.fspath(folder_or_repo), device, key_mapping, **keywords)


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Return the tensors of an adapter from a folder or a Hub repository, from several files where an index says so.

    Args:
        model_id: local folder or Hub repository.
        device: where the tensors go. By default they are mapped into memory on the CPU, and go to the model's devices
            when they are set (PEFT puts them on an accelerator first).
        key_mapping: regular expression -> replacement. The first that occurs in a key (without ``base_model.model.``)
            is applied to it.
        hf_hub_download_kwargs: subfolder, revision, token, ... of ``huggingface_hub.hf_hub_download``.

    Raises:
        CheckpointMissingError: no weights there.
        CheckpointError: the file is damaged or holds something else than named tensors, a save into the folder was
            cut off, or ``key_mapping`` is wrong.
    """
    subfolder = hf_hub_download_kwargs.pop("subfolder", None)
    try:
        path = weights_file(model_id, subfolder, **hf_hub_download_kwargs)
    except CheckpointMissingError:
        shards = shards_of(model_id, subfolder, **hf_hub_download_kwargs)
        if shards is None:
            raise
        return remapped(_read_shards(shards, device), key_mapping)
    return remapped(read_tensors(path, device), key_mapping)


def weights_file(folder_or_repo: str | os.PathLike[str], subfolder: str | None = None, **hub_keywords: Any) -> str:
    """Return the local path of an adapter's weights: safetensors if there are any, else a ``.bin`` file.

    Raises:
        CheckpointMissingError: there are none.
        CheckpointError: a save into the folder was cut off.
    """
    local = Path(os.fspath(folder_or_repo), subfolder or "")
    left = sorted(name for name in os.listdir(local) if name.endswith(REPLACED)) if local.is_dir() else []
    if left:
        raise CheckpointError(
            f"{str(local)!r}: a save into this folder was cut off, so its files may not belong together. Save again, "
            f"or delete {left[0]!r} to use them as they are"
        )
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        if (local / name).is_file():
            return str(local / name)
    try:
        return resolve_file(folder_or_repo, SAFETENSORS_WEIGHTS_NAME, subfolder, **hub_keywords)
    except CheckpointMissingError as error:
        try:
            return resolve_file(folder_or_repo, WEIGHTS_NAME, subfolder, **hub_keywords)
        except CheckpointMissingError:
            raise error from None


# How the old version of a file is called while a save replaces several files; see checkpoint.commit.
REPLACED = ".replaced"


def read_tensors(path: str | os.PathLike[str], device: str | torch.device | None = None) -> dict[str, Tensor]:
    """Return the named tensors in a ``.safetensors`` or ``.bin`` file; the latter is unpickled as tensors only.

    Raises:
        CheckpointMissingError: no such file.
        CheckpointError: the file is damaged, or holds something else.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise CheckpointMissingError(f"{path}: expected a file of tensors, found none.")
    return _read_safetensors(path, device) if path.endswith(".safetensors") else _read_bin(path, device)


def _read_shards(shards: Mapping[str, str], device: str | torch.device | None) -> dict[str, Tensor]:
    files = {path: read_tensors(path, device) for path in sorted(set(shards.values()))}
    for key, path in shards.items():
        if key not in files[path]:
            raise CheckpointError(f"{path}: expected the tensor {key!r}, which the index says is here")
    return {key: files[path][key] for key, path in shards.items()}


def _read_safetensors(path: str, device: str | torch.device | None) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    wanted = torch.device("cpu" if device is None else device)
    through_cpu = wanted.type == "mps"
    try:
        mapped = mapped_tensors(path) if wanted.type == "cpu" else None
        if mapped is not None:
            return mapped
        tensors = load_file(path, device="cpu" if through_cpu else str(wanted))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: expected a safetensors file, found one that cannot be read: {error}") from error
    return {key: value.to(wanted) for key, value in tensors.items()} if through_cpu else tensors


def _read_bin(path: str, device: str | torch.device | None) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location=torch.device("cpu" if device is None else device), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: expected a file of tensors, found one that cannot be read: {reason}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, found {type(found).__name__}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: expected a dict of tensors, found {key!r}: {type(value).__name__}")
    return found


def remapped(tensors: dict[str, Tensor], key_mapping: Mapping[str, str] | None) -> dict[str, Tensor]:
    """Return the tensors under other keys: the first pattern that occurs in a key, without its prefix, is replaced.

    Raises:
        CheckpointError: a pattern is no regular expression, or two keys become one.
    """
    if not key_mapping:
        return tensors
    result: dict[str, Tensor] = {}
    for key, value in tensors.items():
        prefix = next((p for p in ("base_model.model.", "base_model.") if key.startswith(p)), "")
        rest = key[len(prefix) :]
        for pattern, replacement in key_mapping.items():
            try:
                changed, count = re.subn(pattern, replacement, rest)
            except re.error as error:
                raise CheckpointError(f"key_mapping: {pattern!r} is not a regular expression: {error}") from error
            if count:
                rest = changed
                break
        if f"{prefix}{rest}" in result:
            raise CheckpointError(f"key_mapping: two keys become {prefix + rest!r}")
        result[f"{prefix}{rest}"] = value
    return result
