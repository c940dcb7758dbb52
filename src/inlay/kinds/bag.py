"""``nn.EmbeddingBag``: an embedding whose rows are summed, averaged, or compared by feature, bag by bag."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core import storage
from inlay.core.affine import Affine, Site
from inlay.core.kind import Kind
from inlay.core.route import split_rows
from inlay.kernels.bags import Bags, pool
from inlay.kinds.embedding import Embedding

__all__ = ["EmbeddingBag", "LargestBag"]


class EmbeddingBag(Embedding):
    """Weight (vocabulary, dim), seen as (dim, vocabulary). Sums and means are linear in it, so adapters add to bags."""

    name = "embedding_bag"
    takes_arguments = True

    def claims(self, module: Any) -> bool:
        return isinstance(module, nn.EmbeddingBag)

    def of(self, module: Any) -> Kind:
        return _LARGEST if module.mode == "max" else self

    def site(self, name: str, module: Any) -> Site:
        return Site(
            name,
            self.name,
            module.embedding_dim,
            module.num_embeddings,
            lookup=True,
            pooled=True,
            padding=module.padding_idx,
        )

    def called(self, module: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Bags:
        if isinstance(module, Bags):
            return module
        given = dict(zip(("offsets", "per_sample_weights"), args, strict=False)) | kwargs
        return Bags(module, x, given.get("offsets"), given.get("per_sample_weights"))

    def product(self, module: Any, site: Site, affine: Affine, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        table = affine.weight.t()
        rows = pool(module, x, table.to(dtype or self.weight_dtype(module) or table.dtype), module.padding_idx)
        return rows if affine.bias is None else rows + affine.bias.to(rows.dtype)

    def weight_dtype(self, module: Any) -> torch.dtype | None:
        return storage.floating_dtype(module.module if isinstance(module, Bags) else module, self.weight_name)

    def routed(
        self,
        layer: Any,
        names: tuple[str, ...],
        run: Callable[[str, tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Serve each bag by its adapter, also where bags stand one after the other in one axis."""
        kwargs = dict(kwargs)
        x = args[0] if args else kwargs.pop("input")
        given = dict(zip(("offsets", "per_sample_weights"), args[1:], strict=False)) | kwargs
        offsets, weights = given.pop("offsets", None), given.pop("per_sample_weights", None)
        if offsets is None:
            given |= {} if weights is None else {"per_sample_weights": weights}
            return split_rows(str(self.name), names, run, (x,), given)
        last = layer.leaf_layer.include_last_offset
        ends = offsets[1:] if last else torch.cat([offsets[1:], offsets.new_tensor([x.numel()])])
        starts = offsets[:-1] if last else offsets
        bounds = torch.stack([starts, ends], dim=1)

        def part(name: str, bags: tuple[Any, ...], own: dict[str, Any]) -> Any:
            sizes = bags[0][:, 1] - bags[0][:, 0]
            firsts = sizes.cumsum(0) - sizes
            place = torch.arange(int(sizes.sum()), device=x.device)
            index = place + (bags[0][:, 0] - firsts).repeat_interleave(sizes)
            moved = torch.cat([firsts, sizes.sum(0, keepdim=True)]) if last else firsts
            inner = {"offsets": moved.to(offsets.dtype), **own}
            if weights is not None:
                inner["per_sample_weights"] = weights[index]
            return run(name, (x[index],), inner)

        return split_rows(str(self.name), names, part, (bounds,), given)


class LargestBag(EmbeddingBag):
    """Bags of mode ``max``: the largest of sums is not the sum of the largest, so the table itself is rewritten."""

    activation = False


_LARGEST = LargestBag()
