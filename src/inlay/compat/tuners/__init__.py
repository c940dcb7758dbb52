"""PEFT's tuners: ``BaseTuner`` with its hooks, a class for each method, and methods that users bring."""

from __future__ import annotations

from typing import Any

from inlay.compat.tuners.methods import LycorisTuner, tuner_of

__all__ = ["provide", "tuner_of"]


def provide(home: str, name: str) -> Any:
    """Return what stands for a class that PEFT's module ``home`` defines, or None where it is no tuner class."""
    if home == "tuners.mixed.model" and name == "MixedModel":
        from inlay.models.mixed import MixedModel

        return MixedModel
    if home == "tuners.lycoris_utils" and name == "LycorisTuner":
        return LycorisTuner
    if home == "tuners.lycoris_utils" and name == "LycorisConfig":
        from inlay.compat.tuners.lycoris import LycorisConfig

        return LycorisConfig
    parts = home.split(".")
    if len(parts) == 3 and parts[2] == "model":
        made = tuner_of(parts[1].upper())
        if made is not None and made.__name__ == name:
            return made
    return None
