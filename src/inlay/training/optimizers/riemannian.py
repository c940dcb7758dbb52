"""Riemannian preconditioning: gradients of A and B measured in each other's metric (Zhang & Pilanci 2024).

arXiv:2402.02347: ``g_A <- (B^T B + reg I)^-1 g_A`` and ``g_B <- g_B (A A^T + reg I)^-1``, each of them r x r.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.errors import ConfigError, ConfigTypeError, TargetError
from inlay.training.optimizers.factors import Name, Packing, damped_inverse

__all__ = ["create_riemannian_optimizer"]


@dataclass(frozen=True)
class _Pair:
    """Two factors that both train.

    Attributes:
        packing: the updates that they hold.
        values: singular values between them, or None.
    """

    A: Tensor
    B: Tensor
    packing: Packing
    values: Tensor | None = None

    @torch.no_grad()
    def precondition(self, reg: float) -> None:
        """Change the gradients in place, each by the factors as they are now; computed in float32 at least."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A = self.packing.scaled_A(self.A, self.values, dtype)
        B = self.packing.scaled_B(self.B, self.values, dtype)
        if self.A.grad is not None:
            grad = self.packing.matrices_A(self.A.grad).to(dtype)
            self.A.grad.copy_((damped_inverse(B.mT @ B, reg) @ grad).reshape(self.A.shape))
        if self.B.grad is not None:
            grad = self.packing.matrices_B(self.B.grad).to(dtype)
            self.B.grad.copy_(self.packing.packed_B(grad @ damped_inverse(A @ A.mT, reg), self.B))


def _pairs(model: nn.Module) -> list[_Pair]:
    """Return the factors of linear layers and of expert banks, where both train."""
    named = dict(model.named_parameters())
    found = []
    for name, A in named.items():
        parsed = Name.parse(name)
        if parsed is None or not parsed.is_factor or parsed.container != "lora_A":
            continue
        B = named.get(parsed.other("lora_B"))
        if B is not None and A.ndim == B.ndim == 2 and A.requires_grad and B.requires_grad:
            found.append(_Pair(A, B, Packing.at(model, name).of(A, B), named.get(parsed.values)))
    return found


def create_riemannian_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    reg: float = 1e-2,
    **kwargs: Any,
) -> Optimizer:
    """Return an optimiser of a subclass of ``optimizer_cls`` that preconditions the gradients of LoRA's factors.

    Convolutions, embeddings and whatever else trains take the steps of ``optimizer_cls``.

    Args:
        model: a model with LoRA adapters on linear layers.
        optimizer_cls: such as ``torch.optim.AdamW``.
        lr: learning rate.
        reg: what is added to the diagonals before inverting, so that factors of lower rank do no harm.
        kwargs: what ``optimizer_cls`` takes.

    Raises:
        ConfigTypeError: ``optimizer_cls`` is no optimiser's class.
        ConfigError: it needs a closure, whose evaluations would undo the preconditioning.
        TargetError: no pair of factors trains.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise ConfigTypeError(f"optimizer_cls: expected a subclass of torch.optim.Optimizer, found {optimizer_cls!r}")
    pairs = _pairs(model)
    if not pairs:
        raise TargetError(
            f"this {type(model).__name__} has no linear layer with factors lora_A and lora_B that both train, which is "
            "what the Riemannian metric is about"
        )
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"optimizer_cls: {optimizer_cls.__name__} evaluates the loss several times in a step, and its line search "
            "would compare gradients of different metrics; choose one whose step needs no closure"
        )
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return _preconditioned(optimizer_cls, pairs, reg)(trainable, lr=lr, **kwargs)


def _preconditioned(optimizer_cls: Any, pairs: list[_Pair], reg: float) -> Any:
    """Return the subclass whose steps precondition ``pairs`` first."""
    below = optimizer_cls.step
    if getattr(below, "hooked", False):  # torch has put the calls of step hooks around it, and does so here as well
        below = below.__wrapped__

    def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Raises:
            ConfigError: ``closure`` is given: it would compute the gradients anew, without their preconditioning.
        """
        if closure is not None:
            raise ConfigError(
                "closure: expected none: it would compute the gradients anew after they were preconditioned"
            )
        with torch.no_grad():
            for pair in pairs:
                pair.precondition(reg)
            return below(self)

    return type("RiemannianPreconditionedOptimizer", (optimizer_cls,), {"step": step, "__doc__": optimizer_cls.__doc__})
