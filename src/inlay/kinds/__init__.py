"""The built-in layer kinds. Importing this package registers them."""

from inlay.core.kind import register_kind
from inlay.kinds.conv import Conv
from inlay.kinds.embedding import Embedding
from inlay.kinds.linear import Linear
from inlay.kinds.norm import Norm

__all__ = ["Conv", "Embedding", "Linear", "Norm"]

for _kind in (Norm(), Embedding(), Conv(1), Conv(2), Conv(3), Linear()):
    register_kind(_kind)
