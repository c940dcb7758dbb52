"""One configuration out of several: targets and lists that hold what each of them has."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from inlay.errors import CombinationError, ConfigTypeError

__all__ = ["derived", "united", "united_targets", "united_tokens"]


def united_targets(configs: Sequence[Any], field: str) -> str | set[str]:
    """Return the union of a field that holds names, or one regular expression.

    Raises:
        CombinationError: some hold names and others an expression.
        ConfigTypeError: one holds neither.
    """
    values = [getattr(config, field) for config in configs]
    for value in values:
        if not isinstance(value, (str, set, list, tuple)):
            raise ConfigTypeError(f"{field}: expected names or a regular expression, found {value!r}")
    expressions = [value for value in values if isinstance(value, str)]
    if not expressions:
        return set().union(*values)
    if len(expressions) < len(values):
        raise CombinationError(
            f"{field} is a regular expression ({expressions[0]!r}) in some of the adapters' configurations and a "
            "collection of names in others; combining takes one kind"
        )
    return "|".join(f"({expression})" for expression in expressions)


def united_tokens(configs: Sequence[Any]) -> Any:
    """Return the ``trainable_token_indices`` that hold those of every configuration.

    Raises:
        CombinationError: some name the layer and others do not.
    """
    given = [tokens for config in configs if (tokens := getattr(config, "trainable_token_indices", None))]
    if not given:
        return None
    if len({isinstance(tokens, dict) for tokens in given}) > 1:
        raise CombinationError(
            "trainable_token_indices: some adapters give indices and others a dict of layer -> indices, which cannot "
            "be united"
        )
    if not isinstance(given[0], dict):
        return sorted({index for tokens in given for index in tokens})
    names = dict.fromkeys(name for tokens in given for name in tokens)
    return {name: sorted({index for tokens in given for index in tokens.get(name, ())}) for name in names}


def united(configs: Sequence[Any], field: str) -> list[str] | None:
    """Return the names that a list field has in any of the configurations, in order, or None."""
    found = dict.fromkeys(name for config in configs for name in getattr(config, field, None) or ())
    return list(found) or None


def derived(config: Any, **fields: Any) -> Any:
    """Return a copy of a configuration with other values, sharing nothing with it."""
    return dataclasses.replace(copy.deepcopy(config), **fields)
