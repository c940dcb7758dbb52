"""The built-in layer kinds. Importing this package registers them."""

from inlay.core.kind import register_kind
from inlay.kinds.attention import Attention
from inlay.kinds.conv import Conv
from inlay.kinds.embedding import Embedding
from inlay.kinds.linear import Linear
from inlay.kinds.norm import Norm
from inlay.kinds.stacked import Stacked

__all__ = ["Attention", "Conv", "Embedding", "Linear", "Norm", "Stacked"]

for _kind in (Norm(), Attention(), Embedding(), Conv(1), Conv(2), Conv(3), Linear()):
    register_kind(_kind)
