"""Methods and tasks to classes, as mappings that import a method when it is looked up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

from inlay.config.types import PeftType, TaskType
from inlay.core.registry import config_class, forget_tuner, method_types, register_tuner
from inlay.errors import ConfigError
from inlay.models.peft_model import PeftModel
from inlay.models.tasks import wrapper_class
from inlay.models.tuner import AdapterModel, tuner_class

__all__ = ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"]

V = TypeVar("V")


class _ByMethod(Mapping[Any, V]):
    """A class by ``PeftType``, or its name."""

    def __init__(self, find: Callable[[Any], V]) -> None:
        self._find = find

    def __getitem__(self, peft_type: Any) -> V:
        try:
            return self._find(peft_type)
        except ConfigError as error:
            raise KeyError(str(error)) from None

    def __iter__(self) -> Iterator[Any]:
        return (PeftType(name) if name in PeftType.__members__ else name for name in method_types())

    def __len__(self) -> int:
        return len(method_types())

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{key!r}: {value!r}' for key, value in self.items())}}}"


class _Tuners(_ByMethod[type[AdapterModel]], MutableMapping[Any, type[AdapterModel]]):
    """The same, where a class of one's own may be entered and taken out again."""

    def __setitem__(self, peft_type: Any, cls: type[AdapterModel]) -> None:
        register_tuner(peft_type, cls)

    def __delitem__(self, peft_type: Any) -> None:
        forget_tuner(peft_type)


PEFT_TYPE_TO_CONFIG_MAPPING: Mapping[Any, type[Any]] = _ByMethod(config_class)
PEFT_TYPE_TO_TUNER_MAPPING: MutableMapping[Any, type[AdapterModel]] = _Tuners(tuner_class)
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {task.value: wrapper_class(task) for task in TaskType}
