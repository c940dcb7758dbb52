"""The laws that every method, kind and storage obeys, for those that others write.

:func:`check` runs them; pytest is not needed.
"""

from inlay.testing.check import Checked, check
from inlay.testing.laws import LAWS
from inlay.testing.layers import BATCH, LAYERS, LayerCase

__all__ = ["BATCH", "LAWS", "LAYERS", "Checked", "LayerCase", "check"]
