"""Dataclasses that check their values: `setting` declares a field, `Settings` and `settings` make the class."""

from __future__ import annotations

import dataclasses
import inspect
import reprlib
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from inlay.config.checking import check_field, field_hints
from inlay.errors import ConfigError, InlayWarning, UnknownFieldError, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self, dataclass_transform
else:  # type checkers alone read the mark

    def dataclass_transform(**_: Any) -> Any:
        return lambda decorator: decorator


__all__ = ["Settings", "setting", "settings"]

Made = TypeVar("Made", bound=type[Any])


def setting(
    default: Any = MISSING,
    *,
    doc: str,
    factory: Callable[[], Any] | None = None,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Sequence[Any] | None = None,
    parameters: str = "none",
    check: Callable[[Any], str | None] | None = None,
    keyword: bool = False,
) -> Any:
    """Declare one configuration field.

    Args:
        default: the value where none is given; ``factory`` makes mutable ones.
        doc: one sentence on the effect; the reference pages are made from it.
        gt, ge, lt, le: limits on the number, or on every number in a list or in a dict's values.
        choices: the only values allowed.
        parameters: the effect on the number of trained parameters, in a short phrase.
        check: called with a value that is not None; returns what was expected where the value is wrong, else None.
        keyword: the constructor takes it by name only, and it stands behind all other fields.
    """
    metadata = {
        "doc": doc,
        "help": doc,  # the key that transformers' HfArgumentParser shows
        "parameters": parameters,
        "gt": gt,
        "ge": ge,
        "lt": lt,
        "le": le,
        "choices": None if choices is None else tuple(choices),
        "check": check,
    }
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata=metadata, kw_only=keyword)
    return dataclasses.field(default=default, metadata=metadata, kw_only=keyword)


class _ConstructorSignature:
    """Show ``inspect`` the dataclass's own constructor, which `Settings.__new__` would hide."""

    def __get__(self, instance: object, owner: type[Any]) -> inspect.Signature:
        signature = inspect.signature(owner.__init__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Settings:
    """A dataclass whose values are checked against their annotations and limits.

    Sub-configurations derive from it directly; they are written to JSON as nested objects.
    """

    __signature__ = _ConstructorSignature()

    unsaid: ClassVar[dict[str, Any]] = {}
    """What a file or a pickle without a field means by that, where it is not the default."""

    def __init_subclass__(cls) -> None:
        """Bring the fields of mix-ins among the class's own, before ``dataclass`` looks at them.

        A plain value that the class has under the name of such a field (``r = 32``) is its default there.

        Dataclasses put inherited fields first and in the order of inheritance, which could never give every method
        the order of arguments that it has in PEFT. So mix-ins are no dataclasses themselves.
        """
        super().__init_subclass__()
        inherited = {field.name for base in cls.__mro__[1:] for field in _fields(base)}
        own = inspect.get_annotations(cls)
        woven: dict[str, Any] = {}
        for part in cls.__mro__[1:]:
            for name in inspect.get_annotations(part):
                declared = vars(part).get(name)
                if isinstance(declared, dataclasses.Field) and name not in inherited and name not in woven:
                    woven[name] = field_hints(part)[name]
                    if name not in own or name not in vars(cls):
                        setattr(cls, name, _of_class(declared, vars(cls).get(name, MISSING)))
        cls.__annotations__ = {**woven, **own}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        names = [field.name for field in _fields(cls) if field.init]
        for key in kwargs:
            if key not in names:
                raise UnknownFieldError(
                    f"{cls.__name__}() got an unexpected keyword argument {key!r}.{did_you_mean(key, names)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.validate()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle, which may be of a class with fewer fields; what it lacks has its default."""
        values = {**self.unsaid, **state}
        for field in _fields(type(self)):
            if field.name not in values and field.default_factory is not dataclasses.MISSING:
                values[field.name] = field.default_factory()
            elif field.name not in values and field.default is not dataclasses.MISSING:
                values[field.name] = field.default
        self.__dict__.update(values)

    def validate(self) -> None:
        """Check every field again, as the constructor did; useful after assigning to one.

        Raises:
            ConfigTypeError: a value of the wrong type.
            ConfigError: a value that is not allowed, by itself or beside another.
        """
        cls = type(self)
        checked = {
            field.name: check_field(cls, field, getattr(self, field.name))
            for field in _fields(self)
            if hasattr(self, field.name)  # one without a default that the constructor does not take
        }
        for name, value in checked.items():
            setattr(self, name, value)
        for part in reversed(cls.__mro__):
            if "check_fields" in vars(part):
                vars(part)["check_fields"](self)

    def wrong(self, field: str, text: str) -> ConfigError:
        """Return what to raise where a field is wrong beside another: ``expected ..., found ...``, and why."""
        return ConfigError(f"{type(self).__name__}.{field}: {text}")

    def warn(self, text: str) -> None:
        """Warn from :meth:`check_fields` about a field, whose name the text starts with."""
        warnings.warn(f"{type(self).__name__}.{text}", InlayWarning, stacklevel=6)

    def __repr__(self) -> str:
        shown = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name, None)
            default = field.default_factory() if field.default_factory is not MISSING else self._implied(field)
            if value != default:
                text = reprlib.repr(getattr(value, "value", value))
                shown.append(f"{field.name}={text}")
        return f"{type(self).__name__}({', '.join(shown)})"

    def _implied(self, field: dataclasses.Field[Any]) -> Any:
        """Return the value that needs no mention in a repr."""
        return getattr(type(self), field.name, field.default)


def _of_class(declared: dataclasses.Field[Any], given: Any) -> Any:
    """Return a mix-in's field as one class has it, given what that class has under its name."""
    if isinstance(given, dataclasses.Field):
        return given
    field = copy(declared)  # it belongs to one class, which writes its name into it
    if given is not MISSING:
        field.default, field.default_factory = given, MISSING
    return field


def _fields(cls: Any) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()


@overload
def settings(cls: Made, /) -> Made: ...
@overload
def settings(*, positional: str) -> Callable[[Made], Made]: ...
@dataclass_transform(field_specifiers=(setting, dataclasses.field))
def settings(cls: Any = None, /, *, positional: str = "") -> Any:
    """Class decorator: ``dataclass``, with a chosen order of arguments and a repr of what is not default.

    Args:
        positional: field names between spaces. Fields of the configuration that is extended come before them, those of
            mix-ins and of the class itself that are not named, after them.

    Raises:
        ConfigError: ``positional`` names a field that the class does not have.
    """

    def apply(cls: Any) -> Any:
        if not issubclass(cls, Settings):
            return cls  # a mix-in: `Settings` weaves its fields into the classes that use it
        declared = inspect.get_annotations(cls)
        for name in positional.split():
            if name not in declared:
                raise ConfigError(f"{cls.__name__} has no field {name!r} to order.{did_you_mean(name, declared)}")
        cls.__annotations__ = {name: declared[name] for name in dict.fromkeys([*positional.split(), *declared])}
        made = dataclass(repr=False)(cls)
        held: dict[str, Any] = made.__dataclass_fields__
        last = [name for name, declared in held.items() if declared.kw_only]
        for name in last:  # also behind those of a class that extends the one that has it
            held[name] = held.pop(name)
        return made

    return apply if cls is None else apply(cls)
