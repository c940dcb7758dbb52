"""The names of PEFT: ``inlay.compat.peft`` and ways to let it answer to ``import peft``.

This room may import everything; nothing imports it but the public names of ``inlay``, lazily, and the command line.
``inlay.compat.peft`` and all modules below it are built from a table when they are imported; see ``namespace``.
"""

from __future__ import annotations

from typing import Any

from inlay.compat import namespace
from inlay.core import registry

namespace.enter()


def _tuner(peft_type: str) -> type[Any] | None:
    """Return PEFT's class for ``base_model`` of a model with adapters of a method."""
    from inlay.compat.tuners import tuner_of

    return tuner_of(peft_type)


registry.tuner_sources.append(_tuner)
