"""Small functions of PEFT's module ``utils.save_and_load`` beside those that ``inlay.checkpoint`` has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.compat.constants import EMBEDDING_LAYER_NAMES

__all__ = [
    "_filter_state_dict_for_adapter_name",
    "_insert_adapter_name_into_state_dict",
    "get_embedding_layer_name",
    "has_valid_embedding_base_layer",
    "torch_load",
]


def has_valid_embedding_base_layer(layer: Any) -> bool:
    """Whether a layer is an adapted one over a linear layer or an embedding."""
    return isinstance(getattr(layer, "base_layer", None), (nn.Linear, nn.Embedding))


def get_embedding_layer_name(model: nn.Module, layer: nn.Module, is_embedding_in_target_modules: bool) -> str | None:
    """Return the name of an embedding whose weights are to be saved, None where there is none.

    Args:
        model: where to look.
        layer: the module that is looked for.
        is_embedding_in_target_modules: the module has adapters, so its name is that of its base layer.
    """
    for name, module in model.named_modules():
        if not is_embedding_in_target_modules and module is layer:
            return name
        if is_embedding_in_target_modules and module is layer and has_valid_embedding_base_layer(module):
            return f"{name}.base_layer" if name.rpartition(".")[2] not in EMBEDDING_LAYER_NAMES else name
    return None


def torch_load(*args: Any, weights_only: bool = True, **kwargs: Any) -> Any:
    """``torch.load``, which by default reads tensors only."""
    return torch.load(*args, weights_only=weights_only, **kwargs)


def _insert_adapter_name_into_state_dict(
    state_dict: Mapping[str, Tensor], adapter_name: str, parameter_prefix: str
) -> dict[str, Tensor]:
    """Turn the keys of a checkpoint into those that a model with an adapter of that name has."""
    renamed = {}
    for key, value in state_dict.items():
        above, found, below = key.partition(parameter_prefix)
        if found:
            leaf, dot, rest = below.partition(".")
            key = f"{above}{found}{leaf}.{adapter_name}{dot}{rest}"
        renamed[key] = value
    return renamed


def _filter_state_dict_for_adapter_name(
    state_dict: Mapping[str, Tensor], unwanted_adapter_names: Iterable[str]
) -> dict[str, Tensor]:
    """Leave out the tensors of other adapters, whose names are a part of their keys."""
    unwanted = set(unwanted_adapter_names)
    return {key: value for key, value in state_dict.items() if unwanted.isdisjoint(key.split("."))}
