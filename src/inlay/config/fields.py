"""Declaring configuration fields: `setting` for one field, mix-ins for the fields that most methods share."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from inlay.config.settings import setting, settings
from inlay.errors import ConfigError

__all__ = [
    "ALL_LINEAR",
    "BlockTargetField",
    "BlockTargetFields",
    "ExcludeField",
    "FanInFanOutField",
    "LayerFields",
    "PatternFields",
    "RankPatternField",
    "SavedModulesField",
    "TargetField",
    "TargetFields",
    "bias_setting",
    "check_pattern",
    "check_pattern_keys",
    "dropout_setting",
    "setting",
]

ALL_LINEAR = "all-linear"
LONGEST_PATTERN = 10_000  # characters; a configuration file is data from elsewhere


def bias_setting(method: str) -> Any:
    """Declare a ``bias`` field with the choices ``none``, ``all`` and ``<method>_only``."""
    return setting(
        default="none",
        doc=f"Which biases of the base train too: none, all in the model, or those of adapted layers ({method}_only); "
        "a trained bias changes the base, so that switching the adapter off does not undo it.",
        choices=("none", "all", f"{method}_only"),
        parameters="adds the length of each trained bias",
    )


def dropout_setting(of: str = "the update") -> Any:
    """Declare a field for the dropout on what ``of`` reads of a layer's input."""
    doc = f"Probability of dropping an input element of {of}."
    return setting(default=0.0, doc=doc, ge=0.0, lt=1.0)


def check_pattern(owner: str, field: str, pattern: str) -> None:
    """Refuse a regular expression that is too long or does not compile.

    Raises:
        ConfigError: names ``owner`` and ``field``.
    """
    if len(pattern) > LONGEST_PATTERN:
        raise ConfigError(
            f"{owner}.{field}: expected a pattern of at most {LONGEST_PATTERN} characters, found {len(pattern)}."
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(
            f"{owner}.{field}: expected a regular expression, found {pattern[:80]!r}, which does not compile: {error}."
        ) from None


def _check_names(config: Any, field: str) -> None:
    """Turn a list of names into a set, or check the one pattern that stands in its place."""
    value = getattr(config, field)
    owner = type(config).__name__
    if isinstance(value, str):
        if value != ALL_LINEAR:
            check_pattern(owner, field, value)
    elif value is not None:
        for name in value:
            if len(name) > LONGEST_PATTERN:
                raise ConfigError(
                    f"{owner}.{field}: expected names of at most {LONGEST_PATTERN} characters, found {len(name)}."
                )
        setattr(config, field, set(value))


def check_pattern_keys(config: Any, field: str) -> None:
    """Check the patterns that a mapping has as its keys; None stands for none."""
    patterns = getattr(config, field)
    if patterns is None:
        setattr(config, field, {})
    for pattern in patterns or ():
        check_pattern(type(config).__name__, field, pattern)


# A mix-in's `check_fields` runs after every single field has been checked against its annotation and limits.


@settings
class TargetField:
    """``target_modules``, ``target_parameters`` and ``scope``: which modules and bare parameters get an adapter."""

    beyond: ClassVar[frozenset[str]] = frozenset({"target_parameters", "scope"})  # in PEFT, LoRA alone has the first

    target_modules: list[str] | set[str] | str | None = setting(
        default=None,
        doc="Modules to adapt: names or endings of names, or one regular expression over whole names, or "
        f"'{ALL_LINEAR}' for every linear layer but the output layer; without it, the model family's defaults.",
        parameters="proportional to the number of modules matched",
    )

    target_parameters: list[str] | None = setting(
        default=None,
        doc="Bare parameters to adapt, by dotted name or ending, such as the stacked weights of experts.",
        parameters="proportional to the number of matrices, for every expert",
    )

    scope: str | None = setting(
        default=None,
        doc="Dotted path of the only part of the model that the other fields look at, such as 'model.language_model'.",
        parameters="less what modules elsewhere would have had",
        keyword=True,
    )

    def check_fields(self) -> None:
        _check_names(self, "target_modules")


@settings
class ExcludeField:
    """``exclude_modules``: which modules stay as they are though they match."""

    exclude_modules: list[str] | set[str] | str | None = setting(
        default=None,
        doc="Modules to leave alone although they match: names or endings, or one regular expression over whole names.",
        parameters="less what the excluded modules would have had",
    )

    def check_fields(self) -> None:
        _check_names(self, "exclude_modules")


@settings
class SavedModulesField:
    """``modules_to_save``: which modules are trained and saved whole."""

    modules_to_save: list[str] | None = setting(
        default=None,
        doc="Modules that are copied, trained in full and saved with the adapter, such as a new classification head.",
        parameters="adds every parameter of those modules",
    )


@settings
class TargetFields(TargetField, ExcludeField, SavedModulesField):
    """The three fields of most methods: ``target_modules``, ``exclude_modules``, ``modules_to_save``."""


@settings
class LayerFields:
    """``layers_to_transform`` and ``layers_pattern``: adapt some blocks of a stack only."""

    layers_to_transform: list[int] | int | None = setting(
        default=None,
        doc="Numbers of the blocks to adapt, counted from 0; all blocks without it.",
        ge=0,
        parameters="proportional to the number of blocks chosen",
    )
    layers_pattern: list[str] | str | None = setting(
        default=None,
        doc="Name of the list that holds the blocks, such as 'layers' or 'h', where it cannot be recognised.",
    )

    def check_fields(self) -> None:
        owner = type(self).__name__
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        for pattern in patterns:
            check_pattern(owner, "layers_pattern", pattern)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                f"{owner}.layers_pattern: expected layers_to_transform beside it, which says which blocks are meant; "
                "found None."
            )
        target = getattr(self, "target_modules", None)
        if isinstance(target, str):
            for field in ("layers_to_transform", "layers_pattern"):
                if getattr(self, field) is not None:
                    raise ConfigError(
                        f"{owner}.{field}: expected None, because target_modules is the string {target[:80]!r} and "
                        "chooses the blocks itself; write target_modules as a list of names to choose blocks by number."
                    )


@settings
class RankPatternField:
    """``rank_pattern``: another rank for some modules."""

    rank_pattern: dict[str, int] | None = setting(
        doc="Ranks that differ from r: module name, ending or regular expression -> rank.",
        factory=dict,
        gt=0,
        parameters="those modules count with their own rank",
    )

    def check_fields(self) -> None:
        check_pattern_keys(self, "rank_pattern")


@settings
class PatternFields(RankPatternField):
    """``rank_pattern`` and ``alpha_pattern``: another rank or scale for some modules."""

    alpha_pattern: dict[str, float] | None = setting(
        doc="Numerators of the scale that differ from the general one: name, ending or regular expression -> number.",
        factory=dict,
    )

    def check_fields(self) -> None:
        check_pattern_keys(self, "alpha_pattern")


@settings
class FanInFanOutField:
    """``fan_in_fan_out``: how a layer outside this library stores its weight."""

    fan_in_fan_out: bool = setting(
        default=False,
        doc="The base weight is stored as (in, out) instead of (out, in); known layers such as transformers' Conv1D "
        "are recognised without it.",
    )


@settings
class BlockTargetField(TargetField, SavedModulesField, LayerFields):
    """Which modules of which blocks are adapted or saved whole; nothing can be excluded."""


@settings
class BlockTargetFields(TargetFields, LayerFields):
    """Which modules of which blocks are adapted, left out, or saved whole."""
