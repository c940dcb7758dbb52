"""What is recorded of PEFT's layer classes (``layers.json``): bases, names of weights, parameters of constructors."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Any

from inlay.core.registry import method_class
from inlay.errors import UnknownMethodError

__all__ = ["Recorded", "is_built", "recorded", "same_family", "view_of"]

_KINDS = {
    "Linear": ("linear",),
    "Embedding": ("embedding",),
    "Conv1d": ("conv1d",),
    "Conv2d": ("conv2d",),
    "Conv3d": ("conv3d",),
    "_ConvNd": ("conv1d", "conv2d", "conv3d"),
    "MultiheadAttention": ("attention",),
    "ParamWrapper": ("stacked",),
    "LNTuningLayer": ("",),
    "TrainableTokensLayer": ("",),
}


@dataclass(frozen=True)
class Recorded:
    """One layer class of PEFT.

    Attributes:
        home: the module that defines it, without ``peft.``.
        name: its name there.
        bases: its bases that are layer classes too, as ``home.name``.
        module: whether it is a module; a mixin otherwise.
        own_weights, own_others: names that it says hold weights, or anything else, by adapter name.
        init, update: parameters of ``__init__`` and ``update_layer``, empty where it has the inherited one.
    """

    home: str
    name: str
    bases: tuple[str, ...]
    module: bool
    own_weights: tuple[str, ...]
    own_others: tuple[str, ...]
    init: str
    update: str

    @property
    def above(self) -> Iterator[Recorded]:
        """Iterate over this class and the recorded ones that it inherits from, nearest first."""
        yield self
        for base in self.bases:
            found = recorded().get(base)
            if found is not None:
                yield from found.above

    @property
    def is_module(self) -> bool:
        return any(one.module for one in self.above)

    @property
    def weights(self) -> tuple[str, ...]:
        return next((one.own_weights for one in self.above if one.own_weights), ())

    @property
    def others(self) -> tuple[str, ...]:
        return next((one.own_others for one in self.above if one.own_others), ())

    @property
    def peft_type(self) -> str | None:
        """The method that it belongs to, as far as its folder says."""
        parts = self.home.split(".")
        return parts[1].upper() if len(parts) > 2 else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the layer kinds it stands on; ``""`` for any, none for mixins and other storages."""
        if not self.is_module or not self.home.endswith(".layer"):
            return ()
        return next((kinds for end, kinds in _KINDS.items() if self.name.endswith(end)), ())

    @cached_property
    def init_signature(self) -> inspect.Signature:
        written = [one.init for one in self.above if one.init and one.init != "*args **kwargs"]
        return _signature(written[0] if written else "*args **kwargs")

    @cached_property
    def update_signature(self) -> inspect.Signature:
        written = [one.update for one in self.above if one.update and one.update != "*args **kwargs"]
        return _signature(written[0] if written else "*args **kwargs")


def _signature(words: str) -> inspect.Signature:
    """Return the signature that a line of words means, with ``self`` in front."""
    kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", kind)]
    for word in words.split():
        if word.startswith("**"):
            parameters.append(inspect.Parameter(word[2:], inspect.Parameter.VAR_KEYWORD))
        elif word.startswith("*"):
            parameters.append(inspect.Parameter(word[1:], inspect.Parameter.VAR_POSITIONAL))
            kind = inspect.Parameter.KEYWORD_ONLY
        else:
            name, has_default, default = word.partition("=")
            value: Any = _value(default) if has_default else inspect.Parameter.empty
            parameters.append(inspect.Parameter(name, kind, default=value))
    # PEFT has parameters without a default behind such with one nowhere, so the order stands
    return inspect.Signature(parameters)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return None  # a function of another library, which only constructed layers of that library need


@lru_cache(maxsize=1)
def recorded() -> dict[str, Recorded]:
    """Return every recorded class by ``home.name``."""
    held = json.loads(files("inlay.compat.layers").joinpath("layers.json").read_text(encoding="utf-8"))
    return {
        f"{home}.{name}": Recorded(
            home,
            name,
            tuple(entry["bases"].split()),
            "module" in entry,
            tuple(entry.get("weights", "").split()),
            tuple(entry.get("others", "").split()),
            entry.get("init", ""),
            entry.get("update", ""),
        )
        for home, classes in held.items()
        for name, entry in classes.items()
    }


@lru_cache(maxsize=256)
def same_family(full: str) -> frozenset[str]:
    """Return the methods whose layers are instances of a class: its own, and those whose classes inherit from it."""
    below = (one for one in recorded().values() if any(f"{up.home}.{up.name}" == full for up in one.above))
    return frozenset(one.peft_type for one in below if one.peft_type is not None)


@lru_cache(maxsize=256)
def view_of(peft_type: str, kind: str) -> str | None:
    """Return the class that stands for a layer of a kind with a method on it: its own, or the method's mixin."""
    own = [full for full, one in recorded().items() if one.peft_type == peft_type and one.home.endswith(".layer")]
    exact = [full for full in own if {kind, ""} & set(recorded()[full].kinds)]
    exact.sort(key=lambda full: len(recorded()[full].kinds))
    mixins = [full for full in own if not recorded()[full].kinds and recorded()[full].weights]
    return next(iter(exact + mixins), None)


def is_built(peft_type: str | None) -> bool:
    """Whether the registry knows a method."""
    try:
        return peft_type is not None and method_class(peft_type) is not None
    except UnknownMethodError:
        return False
