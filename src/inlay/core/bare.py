"""Making modules without what their constructors spend: an adapter makes six of them at every layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from torch import nn

__all__ = ["Light", "Names", "NoDropout", "bare", "begin"]

M = TypeVar("M", bound=nn.Module)

# what ``nn.Module.__init__`` gives to every module, in its order; a dict among them is one's own
_TEMPLATE: dict[str, Any] = dict(nn.Module().__dict__)
_DICTS = tuple(name for name, value in _TEMPLATE.items() if type(value) is dict)
_TABLES: dict[str, Callable[[], Any]] = {
    name: type(value)
    for name, value in _TEMPLATE.items()
    if isinstance(value, (dict, set, list)) and name not in _DICTS
}


class _Table:
    """A table of a module, of hooks for the most part, that is made when it is first asked for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.make = _TABLES[name]

    def __get__(self, module: nn.Module | None, owner: Any = None) -> Any:
        return self if module is None else module.__dict__.setdefault(self.name, self.make())


class Light(nn.Module):
    """A module that has its tables of hooks only once somebody asks for them.

    They are most of what a module costs in time and memory, and what only holds others is hardly ever called.

    Class attributes:
        _eager: tables that it has from the start, because every call looks into them.
    """

    _eager: ClassVar[tuple[str, ...]] = ()


for _name in _TABLES:
    setattr(Light, _name, _Table(_name))
for _name, _value in _TEMPLATE.items():
    if _name != "training" and _name not in _DICTS and _name not in _TABLES:
        setattr(Light, _name, _value)


class Names(Light, nn.ModuleDict):
    """An ``nn.ModuleDict`` of what adapters have at a place, by their names."""

    def _get_name(self) -> str:
        return "ModuleDict"


class NoDropout(Light, nn.Identity):
    """What stands for the dropout of an adapter that has none."""

    def _get_name(self) -> str:
        return "Identity"


def begin(module: nn.Module) -> dict[str, Any]:
    """Do for a new module what ``nn.Module.__init__`` does, in less than half the time; returns its attributes."""
    attributes = module.__dict__
    if isinstance(module, Light):
        attributes["training"] = True
        attributes["_parameters"] = {}
        attributes["_buffers"] = {}
        attributes["_modules"] = {}
        for name in module._eager:
            attributes[name] = _TABLES[name]()
        return attributes
    attributes.update(_TEMPLATE)
    for name, make in _TABLES.items():
        attributes[name] = make()
    for name in _DICTS:
        attributes[name] = {}
    return attributes


def bare(cls: type[M]) -> M:
    """Return a module of a class on which nothing but ``nn.Module.__init__`` was run."""
    module = cls.__new__(cls)
    begin(module)
    return module
