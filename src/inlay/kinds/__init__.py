"""The built-in layer kinds. Importing this package registers them."""

from inlay.core.kind import register_kind
from inlay.kinds.attention import Attention
from inlay.kinds.bag import EmbeddingBag
from inlay.kinds.conv import Conv
from inlay.kinds.embedding import Embedding
from inlay.kinds.linear import Linear
from inlay.kinds.norm import Norm
from inlay.kinds.stacked import Stacked
from inlay.kinds.transposed import ConvTranspose

__all__ = ["Attention", "Conv", "ConvTranspose", "Embedding", "EmbeddingBag", "Linear", "Norm", "Stacked"]

for _kind in (
    *(Norm(), Attention(), *map(ConvTranspose, (1, 2, 3))),
    *(Embedding(), EmbeddingBag(), *map(Conv, (1, 2, 3)), Linear()),
):
    register_kind(_kind)
