"""Making modules without what their constructors spend: an adapter makes six of them at every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

__all__ = ["bare", "begin"]

M = TypeVar("M", bound=nn.Module)

# what ``nn.Module.__init__`` gives to every module, in its order; a dict among them is one's own
_TEMPLATE: dict[str, Any] = dict(nn.Module().__dict__)
_DICTS = tuple(name for name, value in _TEMPLATE.items() if type(value) is dict)
_OTHERS: tuple[tuple[str, Callable[[], Any]], ...] = tuple(
    (name, type(value))
    for name, value in _TEMPLATE.items()
    if isinstance(value, (dict, set, list)) and name not in _DICTS
)


def begin(module: nn.Module) -> dict[str, Any]:
    """Do for a new module what ``nn.Module.__init__`` does, in less than half the time; returns its attributes."""
    attributes = module.__dict__
    attributes.update(_TEMPLATE)
    for name in _DICTS:
        attributes[name] = {}
    for name, make in _OTHERS:
        attributes[name] = make()
    return attributes


def bare(cls: type[M]) -> M:
    """Return a module of a class on which nothing but ``nn.Module.__init__`` was run."""
    module = cls.__new__(cls)
    begin(module)
    return module
