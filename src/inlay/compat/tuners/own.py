"""Methods that users bring: a configuration, a tuner and layers of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from inlay.compat.namespace import table
from inlay.config import PeftType
from inlay.core.affine import Site
from inlay.core.method import Method
from inlay.core.registry import method_types, register_method, register_tuner
from inlay.core.slot import Slot
from inlay.errors import ConfigError, did_you_mean

__all__ = ["Brought", "brought", "register_peft_method"]

# peft_type -> what was registered for it
brought: dict[str, type[Brought]] = {}


class _TakenError(ConfigError, KeyError):
    """PEFT raises a KeyError where a name or prefix is taken."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class Brought(Method):
    """A method whose layers a user's tuner makes; the engine has none for it."""

    config_class: ClassVar[type[Any]]

    def slots(self, site: Site) -> dict[str, Slot]:
        return {}

    def refuse(self, site: Site) -> str | None:
        return "its tuner makes its layers by itself; use get_peft_model or inject_adapter_in_model"


def register_peft_method(
    *, name: str, config_cls: Any, model_cls: Any, prefix: str | None = None, is_mixed_compatible: bool = False
) -> None:
    """Enter a method that is not among Inlay's.

    Args:
        name: in small letters; ``PeftType`` has a member of that name in capitals.
        config_cls: its configuration.
        model_cls: its tuner, a subclass of ``BaseTuner``.
        prefix: what the names of its tensors begin with; by default the name and an underscore.
        is_mixed_compatible: whether its adapters may stand in a mixed model under PEFT's policy.

    Raises:
        ConfigError: the name is not in small letters or ends in an underscore, ``PeftType`` has no such member, the
            method or the prefix is taken, or the tuner names another prefix.
    """
    if name.endswith("_") or not name.islower():
        raise ConfigError(f"name: expected small letters and no underscore at the end, found {name!r}")
    key = name.upper()
    if key not in PeftType.__members__:
        known = [member.lower() for member in PeftType.__members__]
        raise ConfigError(f"name: PeftType has no member {key!r}.{did_you_mean(name, known)}")
    own = f"{name}_" if prefix is None else prefix
    for field, given in (("name", key), ("prefix", own)):
        if _is_known(given):
            raise _TakenError(f"{field}: there is a method {given!r} already")
    theirs = getattr(model_cls, "prefix", None)
    if theirs and theirs != own:
        raise ConfigError(f"prefix: {model_cls.__name__} has the prefix {theirs!r}, and {own!r} was given")
    members = {"config_class": config_cls, "prefix": own, "mixed": is_mixed_compatible, "__module__": __name__}
    method: Any = type(f"{Brought.__name__}_{key}", (Brought,), members)
    register_method(method, PeftType[key])
    register_tuner(PeftType[key], model_cls)
    brought[key] = method


def __getattr__(name: str) -> Any:
    """Find a method by the name of its class, which is how pickle looks for it."""
    found = brought.get(name.removeprefix(f"{Brought.__name__}_"))
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found


def _is_known(name: str) -> bool:
    """Whether a name in capitals is a method's: one of PEFT's, also if it is not built yet, or a user's."""
    folders = {module.split(".")[1].upper() for module in table() if module.startswith("tuners.")}
    return name in folders or name in method_types()
