"""Which of LoRA's variants a configuration asks for, and one class for any set of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from inlay.core.method import Method

__all__ = ["carried_out_by"]

# In the order in which a layer meets them: what draws A, what backward keeps, what scales rows, what A and B are.
_VARIANTS = {
    "monteclora_config": ("monteclora", "MonteCLoRA"),
    "velora_config": ("velora", "VeLoRA"),
    "use_dora": ("dora", "DoRA"),
    "kasa_config": ("kasa", "KaSA"),
    "use_bdlora": ("bdlora", "BDLoRA"),
    "use_qalora": ("qalora", "QALoRA"),
}


def carried_out_by(cls: type[Method], config: Any) -> type[Method]:
    """Return ``cls``, the one variant of it that a configuration asks for, or a class made of all that it asks for."""
    asked = tuple(field for field in _VARIANTS if getattr(config, field, None) not in (None, False))
    return _class_of(asked) if asked else cls


@cache
def _class_of(fields: tuple[str, ...]) -> type[Method]:
    parts = []
    for field in fields:
        module, name = _VARIANTS[field]
        parts.append(getattr(import_module(f"inlay.methods.{module}"), name))
    if len(parts) == 1:
        only: type[Method] = parts[0]
        return only
    name = "+".join(part.__name__ for part in parts)
    return type(name, tuple(parts), {"__reduce__": _reduced, "fields": fields, "__module__": __name__})


def _reduced(method: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    return _blank, (method.fields,), method.__dict__


def _blank(fields: tuple[str, ...]) -> Method:
    """Return an instance without state: pickles name fields, since no module holds the class."""
    return object.__new__(_class_of(fields))
