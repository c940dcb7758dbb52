"""Who knows what: methods by ``peft_type``. Modules are imported when they are asked for, not before."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from inlay.errors import ConfigError, UnknownMethodError, did_you_mean

if TYPE_CHECKING:
    from inlay.core.method import Method

# peft_type -> the module that registers it on import
BUILTIN_METHODS: dict[str, str] = {
    "LORA": "inlay.methods.lora",
    "IA3": "inlay.methods.ia3",
    "LOHA": "inlay.methods.loha",
    "OFT": "inlay.methods.oft",
    "VERA": "inlay.methods.vera",
    "FOURIERFT": "inlay.methods.fourierft",
    "LN_TUNING": "inlay.methods.ln_tuning",
    "TRAINABLE_TOKENS": "inlay.methods.trainable_tokens",
}

_methods: dict[str, type[Method]] = {}
_tuners: dict[str, type[Any]] = {}

# Asked in turn for the class that stands between a wrapper and a model with adapters of a method: peft_type -> class
# or None. A namespace that has such classes adds itself here.
tuner_sources: list[Callable[[str], type[Any] | None]] = []


def register_method(method: type[Method], peft_type: Any = None) -> type[Method]:
    """Class decorator: enter a method and its config class under the config's ``peft_type``, or under another one."""
    key = _key(method.config_class.peft_type if peft_type is None else peft_type)
    known = _methods.get(key)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ConfigError(f"peft_type {key!r} is already registered by {known.__module__}.{known.__qualname__}")
    _methods[key] = method
    return method


def register_tuner(peft_type: Any, cls: type[Any]) -> None:
    """Enter the class that stands between a wrapper and a model with adapters of a method."""
    _tuners[_key(peft_type)] = cls


def forget_tuner(peft_type: Any) -> None:
    """Undo :func:`register_tuner`.

    Raises:
        KeyError: nothing was entered.
    """
    del _tuners[_key(peft_type)]


def registered_tuner(peft_type: Any) -> type[Any] | None:
    """Return the class that was entered for a method, or that a source has for it; None where there is none."""
    key = _key(peft_type)
    if key in _tuners:
        return _tuners[key]
    return next((cls for cls in (source(key) for source in tuner_sources) if cls is not None), None)


def _key(peft_type: Any) -> str:
    return str(getattr(peft_type, "value", peft_type))


def method_types() -> list[str]:
    """Return every ``peft_type`` that can be looked up, sorted."""
    return sorted({*BUILTIN_METHODS, *_methods})


def method_class(peft_type: Any) -> type[Method]:
    """Return the method class for ``peft_type``.

    Raises:
        UnknownMethodError: no method of that name exists.
    """
    key = _key(peft_type)
    if key not in _methods and key in BUILTIN_METHODS:
        import_module(BUILTIN_METHODS[key])
    if key not in _methods:
        raise UnknownMethodError(f"peft_type {key!r} is not an available method.{did_you_mean(key, method_types())}")
    return _methods[key]


def config_class(peft_type: Any) -> type[Any]:
    """Return the config class for ``peft_type``.

    Raises:
        UnknownMethodError: no method of that name exists.
    """
    return method_class(peft_type).config_class
