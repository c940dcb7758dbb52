"""The base model's weights under the names that they have without adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from inlay.checkpoint.tree import Tree
from inlay.core.follow import follower_of
from inlay.errors import CheckpointMismatchError, MergeError, did_you_mean
from inlay.models.operate import merged_names

__all__ = ["get_base_model_state_dict", "set_base_model_state_dict"]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of the model without adapters, by the names that they had before any were added.

    Args:
        model: a model with adapters, wrapped or bare.

    Returns:
        Tensors that share memory with the model's, full copies of ``modules_to_save`` left out.

    Raises:
        StateError: the model has no adapters.
        MergeError: adapters are merged into the weights, so they are not the base model's.
    """
    return {name: tensor.detach() for name, tensor in _base_tensors(model).items()}


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> Any:
    """Write base weights, by the names that they have without adapters; the adapters stay as they are.

    Args:
        model: a model with adapters, wrapped or bare.
        state_dict: tensors by name; they take the device and dtype of the model's.
        strict: missing and unexpected names are an error.

    Returns:
        A named tuple with ``missing_keys`` and ``unexpected_keys``.

    Raises:
        CheckpointMismatchError: names or shapes do not fit; nothing was written.
        MergeError: adapters are merged into the weights.
        StateError: the model has no adapters.
    """
    held = _base_tensors(model)
    missing = [name for name in held if name not in state_dict]
    unexpected = [name for name in state_dict if name not in held]
    problems = []
    if strict and missing:
        problems.append(f"missing {', '.join(map(repr, missing[:5]))}")
    if strict and unexpected:
        problems.append(
            f"unexpected {', '.join(map(repr, unexpected[:5]))}{did_you_mean(unexpected[0], held).removesuffix('?')}"
        )
    problems += [
        f"{name!r}: expected shape {tuple(held[name].shape)}, found {tuple(value.shape)}"
        for name, value in state_dict.items()
        if name in held and held[name].shape != value.shape
    ]
    if problems:
        raise CheckpointMismatchError(f"the base weights do not fit {type(model).__name__}: {'; '.join(problems)}")
    with torch.no_grad():
        for name, value in state_dict.items():
            if name in held:
                held[name].copy_(value)
    return _IncompatibleKeys(missing, unexpected)


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    tree = Tree(model)
    merged = merged_names(tree.state)
    if merged:
        raise MergeError(f"{', '.join(map(repr, merged))} is merged into the base weights; unmerge it first")
    found: dict[str, Tensor] = {}
    for node in tree.nodes:
        if follower_of(node.module) is not None:
            continue
        tables: list[dict[str, Any]] = [node.module._parameters, node.module._buffers]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and name not in node.module._non_persistent_buffers_set:
                    found[f"{node.original}.{name}" if node.original else name] = tensor
    return found
