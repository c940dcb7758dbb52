"""LoRA+: B learns faster than A (Hayou et al. 2024, arXiv:2402.12354)."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.optim import Optimizer

from inlay.core.layer import AdaptedLayer
from inlay.training.optimizers.factors import Name

__all__ = ["create_loraplus_optimizer"]

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Return an optimiser with four groups of the parameters that train now.

    The groups are: everything else (``lr``); both factors on embeddings (``loraplus_lr_embedding``); B and every vector
    (``lr * loraplus_lr_ratio``); those of them that are biases or belong to norms, without weight decay.

    Args:
        model: a model with adapters.
        optimizer_cls: the optimiser's class, such as ``torch.optim.AdamW``.
        lr: learning rate of A.
        loraplus_lr_ratio: learning rate of B over that of A; 1 or more, larger for harder tasks.
        kwargs: ``loraplus_lr_embedding`` (1e-6 unless given), ``loraplus_weight_decay`` (0), and what
            ``optimizer_cls`` takes.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    embedding_lr = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: dict[str, dict[str, Any]] = {
        "A": {"params": [], "weight_decay": decay, "lr": lr},
        "embedding": {"params": [], "weight_decay": decay, "lr": embedding_lr},
        "B": {"params": [], "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
        "B without decay": {"params": [], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    }
    normal = _of_norms(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parsed = Name.parse(name)
            container = "" if parsed is None else parsed.container
            if container in ("lora_embedding_A", "lora_embedding_B"):
                kind = "embedding"
            elif container == "lora_B" or parameter.ndim == 1:
                kind = "B without decay" if "bias" in name or id(parameter) in normal else "B"
            else:
                kind = "A"
            groups[kind]["params"].append(parameter)
    optimizer = optimizer_cls(list(groups.values()), **{**kwargs, "lr": lr})
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _full_precision_embeddings(model)
    return optimizer


def _of_norms(model: nn.Module) -> set[int]:
    """Return the ids of parameters below layer norms, those that transformers knows included."""
    transformers: Any = sys.modules.get("transformers.pytorch_utils")
    norms = (nn.LayerNorm,) if transformers is None else (nn.LayerNorm, *transformers.ALL_LAYERNORM_LAYERS)
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, norms) or (isinstance(module, AdaptedLayer) and module.site.elementwise)
        for parameter in module.parameters()
    }


def _full_precision_embeddings(model: nn.Module) -> None:
    """Let bitsandbytes keep the optimiser's state of embeddings in 32 bits, which 8 are too few for."""
    import bitsandbytes  # type: ignore[import-not-found, unused-ignore]

    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
