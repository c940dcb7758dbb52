"""Finding layers and their holders in a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.compat.layers.base import BaseTunerLayer
from inlay.core.mount import ModuleCopies
from inlay.core.shared import shared_names

__all__ = ["holders_of", "stands_below", "tuner_layers"]


def holders_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return who holds each module that more than one holds."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return {key: held for key, held in found.items() if len(held) > 1}


def stands_below(module: nn.Module, top: nn.Module | None) -> bool:
    return top is not None and any(one is module for one in top.modules())


def tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the tuner layers of a model with the paths that they have without adapters, outermost first."""
    found: list[tuple[str, Any]] = []
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, ModuleCopies):
            return
        if isinstance(module, BaseTunerLayer):
            found.append((path, module))
            below = module._modules.get("base_layer")
            if below is not None:
                visit(path, below)
            return
        passed = shared_names(module)
        for name, child in module._modules.items():
            if child is not None and name not in passed:
                visit(f"{path}.{name}" if path else name, child)

    visit("", model)
    return found
