"""Methods to classes and prefixes, under PEFT's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from inlay.config import PeftType
from inlay.core.registry import method_class, method_types
from inlay.errors import UnknownMethodError
from inlay.models.mappings import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
]

# Prefixes of parameter names that are not the method's own name in small letters.
_PREFIXES = {"ADALORA": "lora_", "LOHA": "hada_", "PVERA": "pvera_lambda_", "VERA": "vera_lambda_"}


class _Prefixes(Mapping[Any, str]):
    """What the parameter names of each method begin with, of those too that are not built yet."""

    def __getitem__(self, peft_type: Any) -> str:
        name = str(getattr(peft_type, "value", peft_type))
        if name in _PREFIXES:
            return _PREFIXES[name]
        try:
            return method_class(name).prefix
        except UnknownMethodError:
            if name not in PeftType.__members__:
                raise KeyError(name) from None
            return f"{name.lower()}_"

    def __iter__(self) -> Iterator[Any]:
        yield from PeftType
        yield from (name for name in method_types() if name not in PeftType.__members__)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Mixed(Mapping[Any, Any]):
    """Tuner classes of the methods that PEFT lets into a mixed model."""

    def __getitem__(self, peft_type: Any) -> Any:
        if not method_class(peft_type).mixed:
            raise KeyError(peft_type)
        return PEFT_TYPE_TO_TUNER_MAPPING[peft_type]

    def __iter__(self) -> Iterator[Any]:
        return (key for key in PEFT_TYPE_TO_TUNER_MAPPING if method_class(key).mixed)

    def __len__(self) -> int:
        return sum(1 for _ in self)


PEFT_TYPE_TO_PREFIX_MAPPING: Mapping[Any, str] = _Prefixes()
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: Mapping[Any, Any] = _Mixed()
