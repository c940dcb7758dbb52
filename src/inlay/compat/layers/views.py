"""PEFT's layer classes, made from what is recorded of them; ``provide`` is where the namespace finds them."""

from __future__ import annotations

import inspect
from functools import lru_cache, partial, wraps
from typing import Any

from torch import nn

from inlay.compat.layers import lora, others, resets, rotating
from inlay.compat.layers.base import BaseTunerLayer
from inlay.compat.layers.constructed import ConstructedLayer, take
from inlay.compat.layers.mixins import TensorLayer, holder_of
from inlay.compat.layers.table import Recorded, recorded, same_family, view_of
from inlay.compat.layers.tokens import TokenMembers
from inlay.compat.layers.viewing import LayerView
from inlay.core.layer import AdaptedLayer
from inlay.core.parameter import ParameterLayer
from inlay.core.surface import attribute_sources
from inlay.kinds.attention import AttentionLayer

__all__ = ["provide"]

# the engine's class below a constructed layer, by the name of its kind
_ENGINE: dict[str, type[AdaptedLayer]] = {"attention": AttentionLayer, "stacked": ParameterLayer}


def provide(home: str, name: str) -> Any:
    """Return what stands for a name that PEFT's module ``home`` defines, or None where it is none of the layers'."""
    full = f"{home}.{name}"
    for module in (lora, others):
        if full in module.FURTHER:
            return module.FURTHER[full]
    if full == "tuners.tuners_utils.BaseTunerLayer":
        return BaseTunerLayer
    return _made(full) if full in recorded() else None


@lru_cache(maxsize=256)
def _made(full: str) -> type[Any]:
    entry = recorded()[full]
    above = [BaseTunerLayer if base not in recorded() else _made(base) for base in entry.bases]
    bases: list[type[Any]] = []
    bases += [module.MEMBERS[full] for module in (lora, others, resets, rotating) if full in module.MEMBERS]
    if entry.is_module and (entry.kinds or not entry.home.endswith(".layer")):
        if not any(issubclass(base, ConstructedLayer) for base in above):
            engine = [_ENGINE[kind] for kind in entry.kinds if kind in _ENGINE]
            bases += [ConstructedLayer, *engine]
    elif entry.is_module and not any(issubclass(base, nn.Module) for base in above):
        bases += [TensorLayer, nn.Module]
    elif not any(issubclass(base, TensorLayer) for base in above):
        bases.append(TensorLayer)
    bases += above
    bases = [one for one in bases if not any(other is not one and one in other.__mro__ for other in bases)]
    namespace: dict[str, Any] = {
        "__module__": f"inlay.compat.peft.{entry.home}",
        "__qualname__": entry.name,
        "__doc__": f"``peft.{full}``: instances are the engine's layers that have its method, on its kind of layer.",
        "_recorded": entry,
        "_view": True,
        "_claims": staticmethod(_Claims(entry)),
    }
    if any(issubclass(base, ConstructedLayer) for base in bases):
        for name, signature in (("__init__", entry.init_signature), ("update_layer", entry.update_signature)):
            namespace[name] = _signed(getattr(ConstructedLayer, name), signature)
    else:
        namespace |= {"adapter_layer_names": entry.weights, "other_param_names": entry.others}
    if nn.Module in bases:
        namespace["__init__"] = _start
    made: type[Any] = LayerView(entry.name, tuple(bases), namespace)
    return made


def _signed(function: Any, signature: inspect.Signature) -> Any:
    """Return a function that does the same and says that it takes what PEFT's takes."""

    @wraps(function)
    def signed(self: Any, *args: Any, **kwargs: Any) -> None:
        function(self, *args, **kwargs)

    signed.__signature__ = signature  # type: ignore[attr-defined]
    return signed


def _start(self: Any, *args: Any, **kwargs: Any) -> None:
    """Set up a mixin that is a module itself: by itself, or below the engine's layer, which passes nothing."""
    if args or kwargs:
        TensorLayer.__init__(self, *args, **kwargs)
    else:
        nn.Module.__init__(self)


class _Claims:
    """Whether one of the engine's layers is an instance of a class of PEFT."""

    def __init__(self, entry: Recorded) -> None:
        self.family = same_family(f"{entry.home}.{entry.name}")
        self.kinds = entry.kinds
        self.open = not entry.is_module or (not entry.kinds and entry.home.endswith(".layer"))

    def __call__(self, layer: Any) -> bool:
        if not isinstance(layer, AdaptedLayer):
            return False
        if not self.open and not {layer.kind.name, ""} & set(self.kinds):
            return False
        return any(kind_of_entry(entry) in self.family for entry in layer._each())


def kind_of_entry(entry: Any) -> str | None:
    """Return the method of an entry as PEFT's classes know it; token rows beside another method are none of theirs."""
    if any(path[0] == "token_adapter" for _, path, _ in entry.places):
        return None
    peft_type = entry.method.config.peft_type
    return str(getattr(peft_type, "value", peft_type))


def _source(layer: AdaptedLayer, name: str) -> Any:
    """Return what PEFT's class for a layer has under a name: a method, a property, or an empty dict of weights."""
    for peft_type in dict.fromkeys(map(kind_of_entry, layer._each())):
        if peft_type is None and name in TokenMembers.__dict__:
            return TokenMembers.__dict__[name].__get__(layer, type(layer))
        full = None if peft_type is None else view_of(peft_type, layer.kind.name)
        if full is None:
            continue
        if name == "update_layer":
            return partial(_update, layer, recorded()[full])
        for cls in _made(full).__mro__:
            if name in cls.__dict__ and not issubclass(cls, nn.Module) and cls is not object:
                found = cls.__dict__[name]
                return found.__get__(layer, type(layer)) if hasattr(found, "__get__") else found
        entry = recorded()[full]
        if name in entry.weights or name in entry.others:
            return holder_of(name, name in entry.weights)
    return NotImplemented


def _update(layer: AdaptedLayer, entry: Recorded, *args: Any, **kwargs: Any) -> None:
    """Give one layer of a model a further adapter, as PEFT's ``update_layer`` does."""
    take(layer, entry, {}, args, kwargs)


attribute_sources.append(_source)
