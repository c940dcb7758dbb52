"""Gradients through a model whose embeddings are frozen."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["is_checkpointing", "let_gradients_in"]


def is_checkpointing(model: Any) -> bool:
    """Whether a model of transformers has gradient checkpointing switched on."""
    on = getattr(model, "is_activation_checkpointing", None)  # the name since transformers 5
    return bool(getattr(model, "is_gradient_checkpointing", False) if on is None else on)


def let_gradients_in(model: Any) -> None:
    """Make the embeddings' output require a gradient: a reentrant checkpoint computes none without."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
