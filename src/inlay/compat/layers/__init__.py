"""PEFT's layer classes: what they are asked for, constructed from and inherited from, over the engine's one layer."""

from inlay.compat.layers.views import provide

__all__ = ["provide"]
