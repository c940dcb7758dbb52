"""``LycorisConfig``, of which the configurations of LoHa and LoKr are instances."""

from __future__ import annotations

from typing import Any

from inlay.config import PatternFields, PeftConfig, settings

__all__ = ["LycorisConfig"]


class _Family(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        method = str(getattr(getattr(instance, "peft_type", None), "value", ""))
        return super().__instancecheck__(instance) or (cls is LycorisConfig and method in ("LOHA", "LOKR"))

    def __subclasscheck__(cls, other: type[Any]) -> bool:
        method = str(getattr(getattr(other, "peft_type", None), "value", ""))
        return super().__subclasscheck__(other) or (cls is LycorisConfig and method in ("LOHA", "LOKR"))


@settings(positional="rank_pattern alpha_pattern")
class LycorisConfig(PatternFields, PeftConfig, metaclass=_Family):
    """What the configurations of LoHa and LoKr have in common: numbers by pattern."""
