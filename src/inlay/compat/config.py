"""What PEFT's module ``config`` has beside the classes."""

from __future__ import annotations

from inlay.config import PeftConfig as PeftConfigMixin

__all__ = ["MIN_EXPECTED_CONFIG_KEYS", "PeftConfigMixin"]

MIN_EXPECTED_CONFIG_KEYS = {"peft_type"}
