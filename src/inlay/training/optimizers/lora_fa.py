"""LoRA-FA: A is frozen, and B follows the full gradient as closely as it can (Zhang et al. 2023, arXiv:2308.03303)."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from inlay.errors import ConfigError, did_you_mean
from inlay.training.optimizers.factors import Name, Packing, damped_inverse, scaling_of

__all__ = ["LoraFAOptimizer", "create_lorafa_optimizer"]

_DAMPING = 1e-8


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: int,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Freeze A in every LoRA layer and return the optimiser.

    Args:
        model: a model with LoRA adapters.
        r, lora_alpha: rank and alpha for layers that do not say their own scale.
        lr: learning rate.
        weight_decay: as in AdamW.
        use_rslora: deprecated: the configuration says it.

    Raises:
        ConfigError: ``use_rslora`` contradicts the configuration of an active adapter.
    """
    own = _active_rslora(model)
    rslora = bool(own) and all(own.values())
    if use_rslora is not None:
        differing = [name for name, value in own.items() if value != use_rslora]
        if differing:
            raise ConfigError(
                f"use_rslora: found {use_rslora!r}, expected what the configuration says of "
                f"{', '.join(map(repr, differing))}; set it in LoraConfig and leave it out here"
            )
        warnings.warn(
            "create_lorafa_optimizer: use_rslora is deprecated; LoraConfig says it", FutureWarning, stacklevel=2
        )
        rslora = use_rslora
    named = list(model.named_parameters())
    for name, parameter in named:
        parsed = Name.parse(name)
        if parsed is not None and parsed.container == "lora_A":
            parameter.requires_grad_(False)
    group = {
        "params": [parameter for _, parameter in named],
        "lr": lr,
        "names": [name for name, _ in named],
        "scaling_factors": [scaling_of(model, name) for name, _ in named],
        "scaling_factor": lora_alpha / math.sqrt(r) if rslora else lora_alpha / r,
        "packings": [dataclasses.astuple(Packing.at(model, name)) for name, _ in named],
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group])


def _active_rslora(model: Any) -> dict[str, bool]:
    active = getattr(model, "active_adapters", ())
    names = active() if callable(active) else active
    configs = getattr(model, "peft_config", {})
    return {name: bool(getattr(configs[name], "use_rslora", False)) for name in names if name in configs}


class LoraFAOptimizer(Optimizer):
    """AdamW, in which the gradient of each B is replaced by ``g (A A^T)^-1 / scale^2``.

    This is the gradient of B that makes the change of ``scale * B A`` come closest to the gradient of the whole
    weight. A is not changed. Magnitudes, biases, factors of embeddings and other parameters take plain AdamW steps.

    Args:
        params: groups that have, beside ``params``, their ``names`` in the model and ``scaling_factors`` (None where a
            parameter has none). ``packings`` says how factors hold several updates, as the fields of ``Packing``.
        lr, betas, eps, weight_decay: as in AdamW.
        correct_bias: divide the running averages by what their start at zero takes away.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps)):
            if value < 0.0:
                raise ConfigError(f"{name}: expected a number not below 0, found {value!r}")
        for value in betas:
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"betas: expected numbers in [0, 1), found {betas!r}")
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias},
        )
        self._warned = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model and returns the loss, with gradients.

        Returns:
            What ``closure`` returned.

        Raises:
            KeyError: a group has no ``scaling_factors``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        states: Any = self.state  # by name: a pair of factors has one
        for group in self.param_groups:
            scalings = self._scalings(group)
            packings = group.get("packings") or [()] * len(scalings)
            named = dict(zip(group["names"], group["params"], strict=True))
            taken: set[str] = set()
            for name, scaling, packing in zip(group["names"], scalings, packings, strict=True):
                parameter = named[name]
                parsed = Name.parse(name)
                if parameter.grad is None:
                    continue
                if parsed is None or not parsed.is_factor:
                    self._adamw(group, states[name], "", parameter, parameter.grad)
                elif parsed.container == "lora_B":
                    other = parsed.other("lora_A")
                    if other not in named:
                        raise ConfigError(f"names: expected {other!r} beside {name!r}.{did_you_mean(other, named)}")
                    key = f"{parsed.layer}.lora".lstrip(".")
                    if key in taken:  # another adapter on the same layer
                        key = f"{key}.{parsed.adapter}"
                    taken.add(key)
                    factor = group["scaling_factor"] if scaling is None else scaling
                    held = Packing(*packing).of(named[other], parameter)
                    grad = _projected(parameter.grad, named[other], named.get(parsed.values), float(factor), held)
                    self._adamw(group, states[key], "_B", parameter, grad)
        return loss

    def _scalings(self, group: dict[str, Any]) -> list[Any]:
        if "scaling_factors" in group:
            return list(group["scaling_factors"])
        if "scaling_factor" not in group:
            raise KeyError("a parameter group of LoraFAOptimizer needs 'scaling_factors', one for each parameter")
        if not self._warned:
            self._warned = True
            warnings.warn(
                "LoraFAOptimizer: 'scaling_factor' of a parameter group is deprecated; give 'scaling_factors', one for "
                "each parameter",
                FutureWarning,
                stacklevel=3,
            )
        return [group["scaling_factor"]] * len(group["params"])

    @staticmethod
    def _adamw(group: dict[str, Any], state: dict[str, Any], suffix: str, parameter: Tensor, grad: Tensor) -> None:
        first, second = f"exp_avg{suffix}", f"exp_avg_sq{suffix}"
        if not state:
            state["step"] = 0
            state[first] = torch.zeros_like(parameter)
            state[second] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state[first].mul_(beta1).add_(grad, alpha=1.0 - beta1)
        state[second].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            size *= math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])
        parameter.addcdiv_(state[first], state[second].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0.0:
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])


def _projected(grad: Tensor, A: Tensor, values: Tensor | None, scaling: float, packing: Packing) -> Tensor:
    """Return ``grad (A A^T)^-1 / scaling^2``, the product in bfloat16 where the device has it, as in PEFT.

    ``values`` are the singular values that A's rows are multiplied by.
    """
    factor = packing.scaled_A(A, values, torch.promote_types(A.dtype, torch.float32))
    inverse = damped_inverse(factor @ factor.mT, _DAMPING)
    with torch.autocast(A.device.type, dtype=torch.bfloat16, enabled=_has_bfloat16(A.device)):
        product = packing.matrices_B(grad).to(inverse.dtype) @ inverse
    return packing.packed_B((1.0 / scaling**2) * product, grad).to(grad.dtype)


def _has_bfloat16(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_bf16_supported())
