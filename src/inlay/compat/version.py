"""The version of PEFT that the namespace stands for, and what can be claimed in its place."""

from __future__ import annotations

import re

from inlay.config import COMPATIBLE_PEFT_VERSION
from inlay.errors import ConfigError

__all__ = ["__version__", "check_version"]

__version__ = COMPATIBLE_PEFT_VERSION

_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[A-Za-z0-9]+(\.[A-Za-z0-9]+)*)?")


def check_version(version: str) -> str:
    """Return ``version`` if packaging tools can read it; it becomes part of metadata and of a folder's name.

    Raises:
        ConfigError: it is no version.
    """
    if not isinstance(version, str) or _VERSION.fullmatch(version) is None:
        raise ConfigError(f"version of peft: expected a version such as '0.21.2', found {version!r}")
    return version
