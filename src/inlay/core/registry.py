"""Who knows what: methods by ``peft_type``. Modules are imported when they are asked for, not before.

A package of others adds methods, layer kinds and storages with :func:`register`. Where its metadata names the module in
the entry-point group ``inlay.methods``, nobody has to import it: the group is loaded when a method, a layer or a tensor
turns up that Inlay itself does not know.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from inlay.config.types import method_name
from inlay.errors import ConfigError, ConfigTypeError, InlayWarning, UnknownMethodError, did_you_mean

if TYPE_CHECKING:
    from inlay.core.method import Method

# peft_type -> the module that registers it on import
BUILTIN_METHODS: dict[str, str] = {
    "LORA": "inlay.methods.lora",
    "IA3": "inlay.methods.ia3",
    "LOHA": "inlay.methods.loha",
    "LOKR": "inlay.methods.lokr",
    "C3A": "inlay.methods.c3a",
    "GRALORA": "inlay.methods.gralora",
    "MISS": "inlay.methods.miss",
    "WAVEFT": "inlay.methods.waveft",
    "SHIRA": "inlay.methods.shira",
    "DELORA": "inlay.methods.delora",
    "OFT": "inlay.methods.oft",
    "PEANUT": "inlay.methods.peanut",
    "BEFT": "inlay.methods.beft",
    "PSOFT": "inlay.methods.psoft",
    "GLORA": "inlay.methods.glora",
    "DEFT": "inlay.methods.deft",
    "HIRA": "inlay.methods.hira",
    "ROAD": "inlay.methods.road",
    "HRA": "inlay.methods.hra",
    "BOFT": "inlay.methods.boft",
    "RANDLORA": "inlay.methods.randlora",
    "VBLORA": "inlay.methods.vblora",
    "UNILORA": "inlay.methods.unilora",
    "TINYLORA": "inlay.methods.tinylora",
    "VERA": "inlay.methods.vera",
    "PVERA": "inlay.methods.pvera",
    "FOURIERFT": "inlay.methods.fourierft",
    "LN_TUNING": "inlay.methods.ln_tuning",
    "SUPERTUNING": "inlay.methods.supertuning",
    "OSF": "inlay.methods.osf",
    "ADALORA": "inlay.methods.adalora",
    "POLY": "inlay.methods.poly",
    "LILY": "inlay.methods.lily",
    "FROD": "inlay.methods.frod",
    "ADAMSS": "inlay.methods.adamss",
    "TRAINABLE_TOKENS": "inlay.methods.trainable_tokens",
}

_methods: dict[str, type[Method]] = {}
_tuners: dict[str, type[Any]] = {}

# Asked in turn for the class that stands between a wrapper and a model with adapters of a method: peft_type -> class
# or None. A namespace that has such classes adds itself here.
tuner_sources: list[Callable[[str], type[Any] | None]] = []


T = TypeVar("T")
ENTRY_POINTS = "inlay.methods"
_loaded: set[str] = set()  # entry points that were loaded, or tried


def register(thing: T) -> T:
    """Class decorator: enter a method, a layer kind or a storage of one's own.

    A method is found by the ``peft_type`` of its config class; kinds and storages are made without arguments and asked
    before those that were entered earlier. Entering the same class again does nothing.

    Args:
        thing: a subclass of ``Method`` (``inlay.core.method``), ``Kind`` (``inlay.core.kind``) or ``Storage``
            (``inlay.core.storage``).

    Raises:
        ConfigTypeError: it is none of these, or a method without a config class that has a ``peft_type``.
        ConfigError: another method has the same ``peft_type``.
    """
    from inlay.core.kind import Kind, register_kind
    from inlay.core.method import Method
    from inlay.core.storage import Storage, register_storage

    if not isinstance(thing, type) or not issubclass(thing, (Method, Kind, Storage)):
        raise ConfigTypeError(f"register: expected a subclass of Method, Kind or Storage, found {thing!r}")
    if issubclass(thing, Kind):
        register_kind(thing())
    elif issubclass(thing, Storage):
        register_storage(thing())
    else:
        config = getattr(thing, "config_class", None)
        if getattr(config, "peft_type", None) is None:
            raise ConfigTypeError(
                f"{thing.__name__}.config_class: expected a config with a peft_type, found {config!r}"
            )
        register_method(thing)
    return thing


def load_installed() -> bool:
    """Load what installed packages name in the entry-point group ``inlay.methods``; say whether anything was new.

    An entry is a module, which registers on import, or a class in it. One that cannot be loaded warns and is left out.
    """
    from importlib.metadata import entry_points

    new = [entry for entry in entry_points(group=ENTRY_POINTS) if entry.value not in _loaded]
    for entry in new:
        _loaded.add(entry.value)
        try:
            found = entry.load()
            if isinstance(found, type):
                register(found)
        except Exception as error:  # whatever a package of others raises
            warnings.warn(
                f"{entry.name} = {entry.value!r}, an entry point of {ENTRY_POINTS}, cannot be loaded: {error}",
                InlayWarning,
                stacklevel=2,
            )
    return bool(new)


def register_method(method: type[Method], peft_type: Any = None) -> type[Method]:
    """Class decorator: enter a method and its config class under the config's ``peft_type``, or under another one."""
    key = method_name(method.config_class.peft_type if peft_type is None else peft_type)
    known = _methods.get(key)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise ConfigError(f"peft_type {key!r} is already registered by {known.__module__}.{known.__qualname__}")
    _methods[key] = method
    return method


def register_tuner(peft_type: Any, cls: type[Any]) -> None:
    """Enter the class that stands between a wrapper and a model with adapters of a method."""
    _tuners[method_name(peft_type)] = cls


def forget_tuner(peft_type: Any) -> None:
    """Undo :func:`register_tuner`.

    Raises:
        KeyError: nothing was entered.
    """
    del _tuners[method_name(peft_type)]


def registered_tuner(peft_type: Any) -> type[Any] | None:
    """Return the class that was entered for a method, or that a source has for it; None where there is none."""
    key = method_name(peft_type)
    if key in _tuners:
        return _tuners[key]
    return next((cls for cls in (source(key) for source in tuner_sources) if cls is not None), None)


def method_types() -> list[str]:
    """Return every ``peft_type`` that can be looked up, sorted."""
    return sorted({*BUILTIN_METHODS, *_methods})


def method_class(peft_type: Any) -> type[Method]:
    """Return the method class for ``peft_type``.

    Raises:
        UnknownMethodError: no method of that name exists.
    """
    key = method_name(peft_type)
    if key not in _methods and key in BUILTIN_METHODS:
        import_module(BUILTIN_METHODS[key])
    if key not in _methods:
        load_installed()
    if key not in _methods:
        raise UnknownMethodError(f"peft_type {key!r} is not an available method.{did_you_mean(key, method_types())}")
    return _methods[key]


def config_class(peft_type: Any) -> type[Any]:
    """Return the config class for ``peft_type``.

    Raises:
        UnknownMethodError: no method of that name exists.
    """
    return method_class(peft_type).config_class
