"""Configurations: checked dataclasses whose JSON is the ``adapter_config.json`` of PEFT.

A method's configuration is written like this::

    @settings(positional="r target_modules exclude_modules dropout")
    class ScaleConfig(TargetFields, PeftConfig):
        peft_type = PeftType.SCALE
        r: int = setting(default=8, doc="Rank of the update.", gt=0, parameters="proportional")
        dropout: float = setting(default=0.0, doc="...", ge=0, lt=1)

``positional`` gives the order of positional arguments where it differs from mix-ins first, own fields next; what it
leaves out follows. A plain ``@dataclass`` works too, with that order and a longer repr.
Rules that join several fields go into ``check_fields(self)``, which runs after the fields were checked one by one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from inlay.config.checking import build, without_unknown
from inlay.config.files import CONFIG_NAME, HUB_KEYWORDS, read_json_object, resolve_file, write_atomically
from inlay.config.hub import PushToHub
from inlay.config.settings import Settings, setting, settings
from inlay.config.types import PeftType, TaskType
from inlay.errors import (
    CheckpointError,
    CheckpointKeyError,
    ConfigError,
    InlayWarning,
    UnknownFieldError,
    UnknownMethodError,
    did_you_mean,
)

__all__ = ["COMPATIBLE_PEFT_VERSION", "PeftConfig"]

COMPATIBLE_PEFT_VERSION = "0.21.2"  # whose files these are; written into every file


@settings
class PeftConfig(Settings, PushToHub):
    """What every adapter configuration has; reads and writes ``adapter_config.json``.

    A subclass sets the class attribute ``peft_type``; instances of it have no other.
    """

    not_saved: ClassVar[frozenset[str]] = frozenset({"runtime_config"})
    """Fields that hold for this process only and are not written."""
    beyond: ClassVar[frozenset[str]] = frozenset()
    """Fields that PEFT's configuration does not have; written only where they are set."""
    unsaid: ClassVar[dict[str, Any]] = {"peft_version": "0.17.1"}  # the last release that did not write it

    task_type: TaskType | str | None = setting(
        default=None,
        doc="What the model is for; chooses the wrapper class that get_peft_model returns.",
        choices=tuple(TaskType),
    )
    peft_type: PeftType | str | None = setting(default=None, doc="The method; fixed by the configuration's class.")
    auto_mapping: dict[str, Any] | None = setting(
        default=None, doc="Class and module of the base model, recorded on saving where task_type does not say them."
    )
    peft_version: str | None = setting(
        default=None, doc="The PEFT release whose file format this is; filled in by itself."
    )
    base_model_name_or_path: str | None = setting(default=None, doc="Where the base model was loaded from.")
    revision: str | None = setting(default=None, doc="The revision of the base model on the Hub.")
    inference_mode: bool = setting(
        default=False,
        doc="Load the adapter frozen instead of trainable.",
        parameters="none of the adapter's parameters train when true",
    )

    def __post_init__(self) -> None:
        cls = type(self)
        fixed = cls.peft_type
        if fixed is not None:
            if self.peft_type is not None and _name(self.peft_type) != _name(fixed):
                raise ConfigError(
                    f"{cls.__name__}.peft_type: expected {_name(fixed)!r}, which this class stands for, "
                    f"found {self.peft_type!r}."
                )
            self.peft_type = fixed
        if self.peft_version is None:
            self.peft_version = COMPATIBLE_PEFT_VERSION
        self.validate()

    def check_fields(self) -> None:
        if self.task_type is not None:
            self.task_type = TaskType(self.task_type)
        if self.peft_type is None or isinstance(self.peft_type, PeftType):
            return
        if self.peft_type in PeftType.__members__:
            self.peft_type = PeftType(self.peft_type)
        elif _name(type(self).peft_type) != self.peft_type:
            from inlay.core.registry import method_types

            known = {*PeftType.__members__, *method_types()}
            if self.peft_type not in known:
                raise ConfigError(
                    f"{type(self).__name__}.peft_type: expected a method's name, found {self.peft_type!r}."
                    f"{did_you_mean(self.peft_type, known)}"
                )

    def _implied(self, field: dataclasses.Field[Any]) -> Any:
        return COMPATIBLE_PEFT_VERSION if field.name == "peft_version" else super()._implied(field)

    @property
    def written_version(self) -> str:
        """The release whose file format a saved adapter of this configuration has."""
        return COMPATIBLE_PEFT_VERSION

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method learns virtual tokens instead of changing layers."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """Whether this is an adaption prompt."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of its own, without those in `not_saved` and those in `beyond` that are unset."""
        left_out = {*self.not_saved, *(key for key in self.beyond if getattr(self, key) is None)}
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}

    def to_json(self, auto_mapping: dict[str, Any] | None = None) -> str:
        """Return the text of ``adapter_config.json``: sorted keys, sets as sorted lists, enums as their values.

        Args:
            auto_mapping: written instead of the field of that name, unless None.

        Raises:
            ConfigError: a field holds something that JSON cannot; names the field.
        """
        content = self.to_dict()
        if auto_mapping is not None:
            content["auto_mapping"] = auto_mapping
        for key, value in content.items():
            try:
                json.dumps(value, allow_nan=False, default=_listed)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{type(self).__name__}.{key}: expected a value that JSON can hold, found {reprlib.repr(value)} "
                    f"({error})."
                ) from error
        return json.dumps(content, indent=2, sort_keys=True, default=_listed)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into a folder, which is made where needed.

        Args:
            save_directory: the folder.
            auto_mapping_dict: (keyword) written in place of the field ``auto_mapping``.

        Raises:
            ConfigError: a field holds something that JSON cannot; nothing is written.
            CheckpointError: ``save_directory`` is a file.
            UnknownFieldError: another keyword.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        for key in kwargs:
            raise UnknownFieldError(f"save_pretrained() got an unexpected keyword argument {key!r}.")
        if os.path.isfile(save_directory):
            raise CheckpointError(f"Expected a folder to save into, found the file {os.fspath(save_directory)!r}.")
        text = self.to_json(auto_mapping)
        os.makedirs(save_directory, exist_ok=True)
        write_atomically(os.path.join(save_directory, CONFIG_NAME), text)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """Read ``adapter_config.json`` from a folder or a Hub repository.

        The file says which class is made, as in PEFT; a file of another method than ``cls`` gives a warning.

        Args:
            pretrained_model_name_or_path: local folder or Hub repository.
            subfolder: a folder inside it.
            kwargs: keywords of ``huggingface_hub.hf_hub_download``, and values for fields that the file lacks. What
                the file says is not overridden: assign to the returned configuration for that.

        Returns:
            A `PeftConfig`; typed as anything, because the file and not ``cls`` decides which.

        Raises:
            CheckpointMissingError: no such file there.
            CheckpointError: the file is damaged.
            CheckpointKeyError: it names no method.
            ConfigError: the file names an unknown method or holds a wrong value; names file and field.
        """
        hub_keywords = {key: value for key, value in kwargs.items() if key in HUB_KEYWORDS}
        path = resolve_file(pretrained_model_name_or_path, CONFIG_NAME, subfolder, **hub_keywords)
        found = cls.from_json_file(path)
        if not isinstance(found.get("peft_type"), str):
            what = f"found {found['peft_type']!r}" if "peft_type" in found else "found no such key"
            raise CheckpointKeyError(f"{path}: key 'peft_type': expected the name of a method, {what}.")
        target = _class_for(found["peft_type"], path)
        if not issubclass(target, cls):
            warnings.warn(
                f"{path} is the configuration of {found['peft_type']}: {target.__name__} is returned, "
                f"not {cls.__name__}.",
                InlayWarning,
                stacklevel=2,
            )
        extra = {key: value for key, value in kwargs.items() if key not in HUB_KEYWORDS}
        names = {field.name for field in dataclasses.fields(target)}
        unused = sorted(key for key in extra if key not in names or (key in found and found[key] != extra[key]))
        if unused:
            warnings.warn(
                f"from_pretrained does not use the keywords {unused}: they are no fields of {target.__name__}, or "
                f"{path} says otherwise; assign to the returned configuration instead.",
                InlayWarning,
                stacklevel=2,
            )
        values = {**{key: value for key, value in extra.items() if key in names}, **found}
        values |= {key: value for key, value in cls.unsaid.items() if values.get(key) is None}
        return _from_values(target, target.check_kwargs(**values), str(path))

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Return the content of a configuration file as a dict, without the fields that hold for one process only.

        Raises:
            CheckpointMissingError: no such file.
            CheckpointError: the file is not a JSON object.
        """
        found = read_json_object(path_json_file)
        for key in sorted(cls.not_saved & found.keys()):
            warnings.warn(
                f"{path_json_file}: {key!r} is ignored; it is never read from a file.", InlayWarning, stacklevel=2
            )
            del found[key]
        return found

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """Make the configuration that ``peft_type`` names, or without it one of this class.

        With ``peft_type`` given, unknown fields are dropped with a warning (they come from files of later versions).

        Raises:
            UnknownFieldError: an unknown field, and no ``peft_type``.
            ConfigError: an unknown ``peft_type`` or a wrong value.
        """
        source = f"{cls.__name__}.from_peft_type"
        if "peft_type" not in kwargs:
            return cls(**kwargs)
        return _from_values(_class_for(kwargs["peft_type"], source), kwargs, source)

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Return the values read from a file, changed where a method must; called before the object is made."""
        return kwargs


def _name(peft_type: Any) -> str | None:
    return getattr(peft_type, "value", peft_type)


def _listed(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def _class_for(peft_type: Any, source: str) -> type[PeftConfig]:
    from inlay.core.registry import config_class, method_types

    try:
        return config_class(peft_type)
    except ConfigError as error:
        reason = str(error)
        if _name(peft_type) in PeftType.__members__:
            reason = f"{_name(peft_type)!r} is a method of PEFT that is not available here; available: "
            reason += f"{', '.join(method_types())}."
        raise UnknownMethodError(f"{source}: peft_type: {reason}") from None


def _from_values(cls: type[PeftConfig], values: Mapping[str, Any], source: str) -> PeftConfig:
    known, unknown = without_unknown(cls, values)
    if unknown:
        warnings.warn(
            f"{source}: {cls.__name__} does not have these fields, which are ignored (a later version may know them): "
            f"{'; '.join(unknown)}",
            InlayWarning,
            stacklevel=3,
        )
    try:
        return build(cls, known)
    except ConfigError as error:
        raise type(error)(f"{source}: {error}") from error
