"""What an action costs, counted in Python calls: seconds depend on the machine."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["calls"]

# Whether a class is a Collection is asked anew after any class was registered with any abstract one.
_OF_ABSTRACT_CLASSES = {"__instancecheck__", "__subclasscheck__", "__subclasshook__", "_check_methods"}


def calls(action: Callable[[], object]) -> Counter[str]:
    """Return how often each Python function is called, by the name of its code.

    The garbage collector stands still meanwhile: it calls finalizers, and what others (hypothesis) hooked into it.
    """
    found: Counter[str] = Counter()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_name not in _OF_ABSTRACT_CLASSES:
            found[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

    before, collecting = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
        if collecting:
            gc.enable()
    return found
