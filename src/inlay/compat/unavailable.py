"""What stands for names of PEFT whose part Inlay does not have yet: importable, never true, loud when used."""

from __future__ import annotations

from functools import cache
from typing import Any

from inlay.errors import NotAvailableError

__all__ = ["unavailable_class", "unavailable_function"]


def _sentence(home: str, name: str) -> str:
    return f"peft.{home}.{name} is not available in this version of Inlay yet"


class Unavailable(type):
    """Class of the classes that are not there: nothing is an instance, and nothing can be made."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotAvailableError(_sentence(cls.__dict__.get("_home", cls.__module__), cls.__name__))

    def __getattr__(cls, name: str) -> Any:
        # hasattr() must be able to say no, and members of enums must not be None
        raise AttributeError(f"{name!r}: {_sentence(cls.__dict__.get('_home', cls.__module__), cls.__name__)}")


@cache  # one object per name, as pickle and dictionaries expect
def unavailable_class(home: str, name: str) -> type[Any]:
    """Return a class that can be imported and asked for in ``isinstance``; constructing it raises.

    Args:
        home: the module of peft that defines it, without ``peft.``.
        name: its name.
    """
    made: type[Any] = Unavailable(name, (), {"__module__": f"inlay.compat.peft.{home}", "_home": home})
    return made


@cache
def unavailable_function(home: str, name: str) -> Any:
    """Return a function that can be imported; calling it raises `NotAvailableError`."""

    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotAvailableError(_sentence(home, name))

    function.__unavailable__ = True  # type: ignore[attr-defined]
    function.__name__ = function.__qualname__ = name
    function.__module__ = f"inlay.compat.peft.{home}"
    return function
