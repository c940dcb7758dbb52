"""Does a value fit a type annotation? The one place where configuration values are checked and normalised."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from inlay.errors import ConfigError, ConfigTypeError, UnknownFieldError, did_you_mean

__all__ = ["build", "check_field", "field_hints", "without_unknown"]

_CONTAINERS = (list, set, frozenset, tuple, dict)
_UNIONS = (Union, types.UnionType)
_hints: WeakKeyDictionary[type[Any], dict[str, Any]] = WeakKeyDictionary()


class _Misfit(Exception):
    """A value does not fit a hint; ``path`` leads to the part that does not."""

    def __init__(self, path: str, expected: str, value: Any, wrong_value: bool = False) -> None:
        super().__init__(expected)
        self.path, self.expected, self.value, self.wrong_value = path, expected, value, wrong_value


def field_hints(cls: type[Any]) -> dict[str, Any]:
    """Return the evaluated annotations of a configuration class, its bases' included.

    Raises:
        ConfigError: an annotation names something that its module does not define.
    """
    if cls in _hints:
        return _hints[cls]
    try:
        _hints[cls] = get_type_hints(cls)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise ConfigError(f"{cls.__name__}: a field's annotation cannot be evaluated: {error}") from error
    return _hints[cls]


def describe(hint: Any) -> str:
    """Return a hint in the words of an error message: ``int or None``, ``'none' or 'all'``."""
    if hint is None or hint is type(None):
        return "None"
    origin, args = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return " or ".join(describe(member) for member in args)
    if origin is Literal:
        return " or ".join(repr(choice) for choice in args)
    if origin is Annotated:
        return describe(args[0])
    if origin in _CONTAINERS and args:
        return f"{origin.__name__}[{', '.join('...' if a is Ellipsis else describe(a) for a in args)}]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(repr(member.value) for member in hint)
    return getattr(origin or hint, "__name__", str(hint))


def _short(value: Any) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _conform_container(value: Any, kind: type, args: tuple[Any, ...], path: str, hint: Any) -> Any:
    if kind is dict:
        if not isinstance(value, Mapping):
            raise _Misfit(path, describe(hint), value)
        key_hint, value_hint = args or (Any, Any)
        return {conform(k, key_hint, path): conform(v, value_hint, f"{path}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, Set)):
        raise _Misfit(path, describe(hint), value)
    # An unordered value for an ordered field takes the one order that does not change between runs.
    items = sorted(value, key=str) if isinstance(value, Set) and kind in (list, tuple) else list(value)
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(items) != len(args):
            raise _Misfit(path, describe(hint), value)
        return tuple(conform(item, arg, f"{path}[{i}]") for i, (item, arg) in enumerate(zip(items, args, strict=True)))
    item_hint = args[0] if args else Any
    fitted = [conform(item, item_hint, f"{path}[{i}]") for i, item in enumerate(items)]
    return fitted if kind is list else kind(fitted)


def _conform_union(value: Any, members: tuple[Any, ...], path: str, hint: Any) -> Any:
    # A container is taken as the member of its own kind, so that a set stays a set beside `list[str]`.
    own_kind = [m for m in members if (get_origin(m) or m) in _CONTAINERS and type(value) is (get_origin(m) or m)]
    inner: _Misfit | None = None
    wrong_value = False
    for member in [*own_kind, *members]:
        try:
            return conform(value, member, path)
        except _Misfit as misfit:
            # A fault inside a container of the right kind says more than the whole union does.
            inner = misfit if inner is None and misfit.path != path else inner
            wrong_value = wrong_value or misfit.wrong_value
    raise inner or _Misfit(path, describe(hint), value, wrong_value)


def conform(value: Any, hint: Any, path: str) -> Any:
    """Return ``value`` as ``hint`` wants it (an enum's value as its member, a tuple as a list), or raise `_Misfit`.

    ``bool`` is no number here, ``float`` accepts an ``int`` and keeps it, and non-finite numbers fit nothing,
    because JSON has none.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return conform(value, args[0], path)
    if origin in _UNIONS:
        return _conform_union(value, args, path, hint)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in args):
            return value
        raise _Misfit(path, describe(hint), value, any(type(value) is type(choice) for choice in args))
    if hint is None or hint is type(None):
        if value is None:
            return None
        raise _Misfit(path, "None", value)
    kind = origin or hint
    if kind in _CONTAINERS:
        return _conform_container(value, kind, args, path, hint)
    if kind is Callable:
        if callable(value):
            return value
        raise _Misfit(path, "something callable", value)
    if kind is Any or not isinstance(kind, type):
        return value  # a type variable, say: nothing to hold the value against
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
            raise _Misfit(path, describe(hint), value)
        plain: Any = value
        if not isinstance(value, (int, float)):  # a NumPy scalar
            plain = int(value) if isinstance(value, Integral) else float(value)
        if not math.isfinite(plain):
            raise _Misfit(path, "a finite number", value, wrong_value=True)
        return plain
    if isinstance(value, kind):
        return value
    if issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            raise _Misfit(path, describe(hint), value, isinstance(value, str)) from None
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return build(kind, value)
    raise _Misfit(path, describe(hint), value)


def _numbers(value: Any) -> list[Any]:
    """Return the numbers in ``value``: itself, or those of a list or a dict's values."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (Sequence, Set)) and not isinstance(value, str):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, Real) and not isinstance(value, bool) else []


def check_field(owner: type[Any], field: dataclasses.Field[Any], value: Any) -> Any:
    """Return ``value`` normalised for ``field`` of ``owner``.

    Raises:
        ConfigTypeError: the type is not what the annotation says.
        ConfigError: the type fits and the value does not (a limit, a choice, the field's own check).
    """
    where = f"{owner.__name__}.{field.name}"
    try:
        value = conform(value, field_hints(owner)[field.name], field.name)
    except _Misfit as misfit:
        error = ConfigError if misfit.wrong_value else ConfigTypeError
        hint = ""
        if misfit.wrong_value and isinstance(misfit.value, str):
            hint = did_you_mean(misfit.value, [part.strip("'") for part in misfit.expected.split(" or ")])
        raise error(
            f"{owner.__name__}.{misfit.path}: expected {misfit.expected}, found {_short(misfit.value)}.{hint}"
        ) from None
    if value is None:
        return None
    rules = field.metadata
    for number in _numbers(value):
        for name, holds, words in (
            ("gt", lambda n, limit: n > limit, "greater than"),
            ("ge", lambda n, limit: n >= limit, "at least"),
            ("lt", lambda n, limit: n < limit, "less than"),
            ("le", lambda n, limit: n <= limit, "at most"),
        ):
            if rules.get(name) is not None and not holds(number, rules[name]):
                raise ConfigError(f"{where}: expected a number {words} {rules[name]}, found {number!r}.")
    choices = rules.get("choices")
    if choices is not None and value not in choices:
        names = [str(getattr(choice, "value", choice)) for choice in choices]
        expected = " or ".join(map(repr, names))
        raise ConfigError(f"{where}: expected {expected}, found {_short(value)}.{did_you_mean(str(value), names)}")
    if rules.get("check") is not None:
        expected = rules["check"](value)
        if expected is not None:
            raise ConfigError(f"{where}: expected {expected}, found {_short(value)}.")
    return value


def build(cls: type[Any], values: Mapping[str, Any]) -> Any:
    """Make a configuration dataclass from a mapping, fields that its constructor does not take included.

    Raises:
        UnknownFieldError: a key is no field of ``cls``.
        ConfigError: a value does not fit.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise UnknownFieldError(f"{cls.__name__} has no field {key!r}.{did_you_mean(str(key), fields)}")
    made = cls(**{key: value for key, value in values.items() if fields[key].init})
    for key, value in values.items():
        if not fields[key].init:
            setattr(made, key, check_field(cls, fields[key], value))
    return made


def _nested(hint: Any) -> type[Any] | None:
    for member in get_args(hint) if get_origin(hint) in _UNIONS else (hint,):
        if isinstance(member, type) and dataclasses.is_dataclass(member):
            return member
    return None


def without_unknown(cls: type[Any], values: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """Return ``values`` without the keys that ``cls`` or its nested configurations lack, and a line on each.

    A null where the field has no such value is left out as well, and means the default: early releases of PEFT had None
    for "not said" in fields that have a plain default now.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    kept: dict[str, Any] = {}
    dropped: list[str] = []
    for key, value in values.items():
        if key not in names:
            dropped.append(f"{prefix + str(key)!r}.{did_you_mean(str(key), names)}".rstrip("."))
            continue
        inner = _nested(field_hints(cls)[key])
        if inner is not None and isinstance(value, Mapping):
            value, more = without_unknown(inner, value, f"{prefix}{key}.")
            dropped += more
        if value is not None or _may_be_none(field_hints(cls)[key]):
            kept[key] = value
    return kept, dropped


def _may_be_none(hint: Any) -> bool:
    try:
        return conform(None, hint, "") is None
    except _Misfit:
        return False
