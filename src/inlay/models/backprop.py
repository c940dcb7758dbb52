"""Gradients through a model whose embeddings are frozen."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from inlay.core.follow import base_modules

__all__ = ["is_checkpointing", "let_gradients_in", "switch_checkpointing_on"]


_FLAG = "gradient_checkpointing"


def is_checkpointing(model: Any, modules: Iterable[nn.Module] | None = None) -> bool:
    """Whether a model of transformers has gradient checkpointing switched on; ``modules`` are its base modules."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing") if library is not None else ():
        asked = getattr(type(model), name, None)
        if asked is not None:
            if asked is library.PreTrainedModel.__dict__.get(name):
                # as it does, in a tenth of the time
                return _any_flagged(base_modules(model) if modules is None else modules)
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


def switch_checkpointing_on(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Switch gradient checkpointing on, by the name that the model has for it; transformers 5 changed it."""
    if not hasattr(model, "activation_checkpointing_enable"):
        model.gradient_checkpointing_enable(*args, **kwargs)
        return
    if "gradient_checkpointing_kwargs" in kwargs:
        kwargs["activation_checkpointing_kwargs"] = kwargs.pop("gradient_checkpointing_kwargs")
    model.activation_checkpointing_enable(*args, **kwargs)


def let_gradients_in(model: Any) -> None:
    """Make the embeddings' output require a gradient: a reentrant checkpoint computes none without."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
