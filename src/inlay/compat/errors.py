"""PEFT's errors and warnings, which are Inlay's own: code that catches PEFT's catches every one of Inlay's."""

from inlay.errors import InlayError as PeftError
from inlay.errors import InlayWarning as PeftWarning
from inlay.errors import NoTargetError as NoMatchingPeftModuleError

__all__ = ["NoMatchingPeftModuleError", "PeftError", "PeftWarning"]
