"""What PEFT's constructors take: arguments by name, and the config and the method that they mean."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from torch import nn

from inlay.compat.layers.table import Recorded
from inlay.core.affine import Site
from inlay.core.kind import Kind, kind_of
from inlay.core.method import Method
from inlay.core.registry import method_class
from inlay.errors import ConfigTypeError, NotAvailableError, UnknownMethodError

__all__ = ["bound", "complete", "kind_and_site", "method_for", "own_config", "widths"]

# arguments that stand for config fields, and win over them
_FIELDS = ("r", "lora_alpha", "alpha", "n_frequency")


def bound(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by name, defaults included; what no parameter is there for stands under its own name.

    Raises:
        TypeError: one is missing, or given twice.
    """
    call = signature.bind(None, *args, **kwargs)
    call.apply_defaults()
    given = dict(call.arguments)
    given.pop("self")
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name)
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            given.pop(name)
    return given


def complete(entry: Recorded, given: dict[str, Any]) -> None:
    """Make a config of arguments that may stand for one, in place: a dict of fields, or the fields themselves.

    Raises:
        NotAvailableError: the method is not built yet.
        ConfigError: the fields are not allowed.
    """
    config = given.get("config")
    if config is not None and not isinstance(config, dict):
        return
    wanted = method_for(entry.peft_type, entry.name, None).config_class
    fields = config or {f.name: given[f.name] for f in dataclasses.fields(wanted) if f.init and f.name in given}
    given["config"] = wanted(**fields)


def method_for(peft_type: str | None, name: str, config: Any) -> type[Method]:
    """Return the method that carries out a config, for a class of that method; without a config, the method.

    Raises:
        NotAvailableError: the method is not built yet.
        ConfigTypeError: the config is another method's.
    """
    try:
        method = method_class(peft_type)
    except UnknownMethodError:
        raise NotAvailableError(f"{name}: {peft_type} is not available in this version of Inlay yet") from None
    if config is None:
        return method
    if not isinstance(config, method.config_class):
        raise ConfigTypeError(
            f"{name}: config expected to be a {method.config_class.__name__}, found {type(config).__name__}"
        )
    return method.variant(config)


def own_config(config: Any, given: dict[str, Any]) -> Any:
    """Return a copy of a config for one layer: the numbers that were given count, and patterns do not.

    Raises:
        ConfigError: a number is not allowed.
    """
    known = {field.name for field in dataclasses.fields(config) if field.init}
    changes = {name: given[name] for name in _FIELDS if name in known and given.get(name) is not None}
    changes |= {name: {} for name in known if name.endswith("_pattern") and name != "layers_pattern"}
    if "is_feedforward" in given and "feedforward_modules" in known:
        changes["feedforward_modules"] = ".*" if given["is_feedforward"] else []
        changes["target_modules"] = None
    return dataclasses.replace(config, **changes)


def kind_and_site(layer: Any, base: nn.Module) -> tuple[Kind | None, Site]:
    """Return a base layer's kind and shape; one that no kind knows is taken for linear, if ``layer`` has its widths.

    Raises:
        ConfigTypeError: it does not.
    """
    kind = kind_of(base)
    if kind is not None:
        return kind, kind.site("", base)
    channels, out = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if not isinstance(channels, int) or not isinstance(out, int):
        raise ConfigTypeError(
            f"{type(layer).__name__} over a {type(base).__name__}: set in_features and out_features before "
            "update_layer, because no layer kind knows the base layer's shape"
        )
    return None, Site("", "linear", out, channels)


_WIDTHS = (
    ("in_features", "out_features"),
    ("in_channels", "out_channels"),
    ("num_embeddings", "embedding_dim"),
    ("infeatures", "outfeatures"),
    ("input_size", "output_size"),
)


def widths(base: Any) -> tuple[int | None, int | None]:
    """Return the input and output features that a layer says of itself, or None and None."""
    if isinstance(base, nn.MultiheadAttention):
        return base.embed_dim, 3 * base.embed_dim
    if type(base).__name__ == "Conv1D":
        return int(base.weight.shape[0]), int(base.weight.shape[1])
    for pair in _WIDTHS:
        if all(hasattr(base, name) for name in pair):
            return getattr(base, pair[0]), getattr(base, pair[1])
    return None, None
