"""Gradients through a model whose embeddings are frozen."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from inlay.core.follow import base_modules

__all__ = ["is_checkpointing", "let_gradients_in"]


_FLAG = "gradient_checkpointing"


def is_checkpointing(model: Any) -> bool:
    """Whether a model of transformers has gradient checkpointing switched on."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing") if library is not None else ():
        asked = getattr(type(model), name, None)
        if asked is not None:
            if asked is library.PreTrainedModel.__dict__.get(name):
                return _any_flagged(base_modules(model))  # as it does, in a tenth of the time
            break
    on = getattr(model, "is_activation_checkpointing", None)  # the name since transformers 5
    return bool(getattr(model, "is_gradient_checkpointing", False) if on is None else on)


def _any_flagged(modules: Iterable[nn.Module]) -> bool:
    declared: dict[type[nn.Module], bool] = {}
    for module in modules:
        cls = type(module)
        if cls not in declared:
            declared[cls] = hasattr(cls, _FLAG)
        if getattr(module, _FLAG) if declared[cls] else module.__dict__.get(_FLAG):
            return True
    return False


def let_gradients_in(model: Any) -> None:
    """Make the embeddings' output require a gradient: a reentrant checkpoint computes none without."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
