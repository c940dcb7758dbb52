"""The version of PEFT that the namespace stands for."""

from inlay.config import COMPATIBLE_PEFT_VERSION

__all__ = ["__version__"]

__version__ = COMPATIBLE_PEFT_VERSION
