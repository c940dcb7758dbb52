"""Optimisers that know which parameters are the factors of a low-rank update."""

from inlay.training.optimizers.lora_fa import LoraFAOptimizer, create_lorafa_optimizer
from inlay.training.optimizers.lora_plus import create_loraplus_optimizer
from inlay.training.optimizers.riemannian import create_riemannian_optimizer

__all__ = [
    "LoraFAOptimizer",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
]
