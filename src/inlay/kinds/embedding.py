"""``nn.Embedding``: a linear layer on one-hot rows, so its matrix view is the transposed table (dim, vocabulary)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.kind import Kind
from inlay.errors import MergeError
from inlay.kernels.table import embed_scale, look_up

__all__ = ["Embedding"]


class Embedding(Kind):
    """Weight (vocabulary, dim). Adapters act on the table, so a scaled embedding scales them too.

    With ``max_norm`` the base lookup renormalises the rows it touches, in place. Adapters add to renormalised rows,
    and a merge that would lift a row above ``max_norm`` is refused, because the next lookup would shrink it.
    """

    name = "embedding"

    def claims(self, module: Any) -> bool:
        return isinstance(module, nn.Embedding)

    def site(self, name: str, module: Any) -> Site:
        assert isinstance(module, nn.Embedding)
        return Site(
            name, self.name, module.embedding_dim, module.num_embeddings, lookup=True, padding=module.padding_idx
        )

    def to_matrix(self, site: Site, stored: Tensor) -> Tensor:
        return stored.t()

    def from_matrix(self, site: Site, weight: Tensor) -> Tensor:
        return weight.t()

    def stored_dims(self, site: Site) -> tuple[str, ...]:
        return ("in", "out")

    def view(self, module: Any, site: Site, weight: Tensor, bias: Tensor | None) -> Affine:
        affine = super().view(module, site, weight, bias)
        if module.max_norm is None:
            return affine
        norms = affine.weight.norm(p=module.norm_type, dim=0, keepdim=True)
        # torch renormalises to max_norm / (norm + 1e-7)
        factor = torch.where(norms > module.max_norm, module.max_norm / (norms + 1e-7), torch.ones_like(norms))
        return Affine(affine.weight * factor)

    def stored(self, module: Any, site: Site, affine: Affine) -> dict[str, Tensor]:
        if module.max_norm is not None:
            norms = affine.weight.norm(p=module.norm_type, dim=0)
            rounding = 4 * torch.finfo(self.weight_dtype(module) or norms.dtype).eps
            if bool((norms > module.max_norm * (1 + rounding)).any()):
                raise MergeError(
                    f"{site.name!r}: the merged table has rows with a norm of up to {float(norms.max()):.4g}, and the "
                    f"layer renormalises rows above max_norm={module.max_norm}, so merging would change the output"
                )
        return super().stored(module, site, affine)

    def product(self, module: Any, site: Site, affine: Affine, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        assert isinstance(module, nn.Embedding)
        rows = look_up(module, x, affine.weight.t())
        rows = rows.to(dtype or self.weight_dtype(module) or rows.dtype) * embed_scale(module)
        return rows if affine.bias is None else rows + affine.bias.to(rows.dtype)
