"""How a class of PEFT's stands for layers of the engine, and small things that its layers share."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from inlay.core.follow import Follower

__all__ = ["Derived", "LayerView", "Own", "listed", "require_grad"]


class LayerView(ABCMeta):
    """Class of the classes that stand for the engine's layers.

    A class that defines ``_claims(layer)`` itself has those of the engine's layers as instances of which it is true;
    its subclasses do not, unless they define their own.
    """

    def __instancecheck__(cls, instance: Any) -> bool:
        if super().__instancecheck__(instance):
            return True
        claims = cls.__dict__.get("_claims")
        if claims is None or not isinstance(instance, Follower):
            return False
        return bool(claims.__get__(None, cls)(instance))


class Derived:
    """A property that users' layers may set for themselves, also to a module."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type[Any]) -> Any:
        if instance is None:
            return self
        held = instance.__dict__.get("_modules", {})
        return held[self._name] if self._name in held else self._function(instance)


def listed(names: str | Iterable[str]) -> list[str]:
    """Return adapter names as a list."""
    return [names] if isinstance(names, str) else list(names)


def require_grad(held: Any, flag: bool) -> None:
    """Switch gradients of a module or a parameter; what cannot have gradients is left alone."""
    parameters = held.parameters() if isinstance(held, nn.Module) else (held,)
    for parameter in parameters:
        if isinstance(parameter, nn.Parameter) and (not flag or parameter.is_floating_point()):
            parameter.requires_grad_(flag)


class Own:
    """A class attribute that gives each instance an empty container of its own when it is first asked for."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type[Any]) -> Any:
        return self._make() if instance is None else instance.__dict__.setdefault(self._name, self._make())
