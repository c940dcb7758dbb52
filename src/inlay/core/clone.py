"""Run a module with other tensors than its own, without touching it.

Swapping a parameter on the shared module would let two threads read each other's weights, so the module is cloned
shallowly: the clone shares everything but the tensors that are replaced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["call_with", "shallow_clone"]


def shallow_clone(module: nn.Module, tensors: dict[str, Tensor], modules: dict[str, Any] | None = None) -> nn.Module:
    """Return a module that shares everything with ``module`` but the named tensors and children."""
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    parameters = dict(module._parameters)
    for name in tensors:
        parameters.pop(name, None)
    clone.__dict__["_parameters"] = parameters
    clone.__dict__["_modules"] = {**module._modules, **(modules or {})}
    # A replaced tensor is not a leaf, so it cannot be registered; an instance attribute is read just the same.
    clone.__dict__.update(tensors)
    return clone


def call_with(module: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``module`` with some of its parameters replaced, hooks included."""
    if torch.compiler.is_compiling():
        return torch.func.functional_call(module, tensors, args, kwargs)
    return shallow_clone(module, tensors)(*args, **kwargs)
