"""What a method sees below itself on a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import inlay.kernels.compressed
import inlay.kernels.parts
import inlay.kernels.structured  # noqa: F401  these enter their ways of multiplying
from inlay.core.affine import Affine, Delta, Dense, LowRank, Site
from inlay.core.dtype import product_dtype
from inlay.core.fused import Updates, active_dropout, delta_reason, fused_dtype, input_reason, run_updates
from inlay.core.method import P
from inlay.core.tasks import tasks_of
from inlay.kernels.halves import down, ranks_last, up
from inlay.kernels.table import apply_delta, sum_of
from inlay.parallel.tensors import decide, in_blocks

if TYPE_CHECKING:
    from inlay.core.entry import Entry
    from inlay.core.layer import AdaptedLayer

__all__ = ["Inner"]


class Inner:
    """The layer as it is below one entry of the chain. It lives for one forward.

    ``inner(x)`` runs what is below; ``inner.apply(x, delta)`` multiplies by an operator the way the layer itself
    would (stride, padding, lookup); ``inner.affine()`` and ``inner.base_affine()`` read the maps; ``inner.run(x,
    affine)`` runs the layer with another map, for a method with no cheaper form.
    """

    __slots__ = ("args", "chain", "depth", "kwargs", "layer")

    def __init__(
        self, layer: AdaptedLayer, chain: tuple[Entry, ...], depth: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.layer = layer
        self.chain = chain
        self.depth = depth
        self.args = args
        self.kwargs = kwargs

    def __call__(self, x: Tensor) -> Tensor:
        if self.depth == 0:
            return self.layer.base_layer(x, *self.args, **self.kwargs)
        below = self.depth - 1
        entry = self.chain[below]
        p = self.layer.params(entry)
        inner = Inner(self.layer, self.chain, below, self.args, self.kwargs)
        if p.training and entry.skip_probability > 0.0:
            skipped = torch.rand((), device=x.device) < entry.skip_probability
            if torch.compiler.is_compiling():  # a graph cannot branch on what was drawn
                return torch.where(skipped, inner(x), entry.method.forward(entry.site, p, x, inner))
            if bool(skipped):
                return inner(x)
        return entry.method.forward(entry.site, p, x, inner)

    @property
    def site(self) -> Site:
        """The shape of what is below."""
        return self.layer.site

    @property
    def is_base(self) -> bool:
        """Whether nothing but the base layer is below, so that ``inner(x)`` is its own output."""
        return self.depth == 0 and not self.layer.merged

    def plus(self, x: Tensor, p: P, delta: Delta, gain: Tensor | None = None) -> Tensor:
        """Return the output of what is below with an update added to it.

        Args:
            x: the layer's input.
            p: the adapter's dropout is applied to the update's input.
            delta: the update.
            gain: (*experts, out) multiplies every row of the untouched weight and of the update, but no bias.
        """
        fused = self._fused(x, p, delta, gain)
        if fused is not None:
            return fused
        y = self(x)
        dropped = p.drop(x)
        if gain is None:
            layer = self.layer
            return sum_of(layer.kind, self._leaf(x), self.site, y, dropped, delta, layer.compute)
        site, base = self.site, self.base_affine()
        if self.is_base and (dropped is x or self.layer.state.policy.own_dropout):
            plain = y if base.bias is None else y - site.along_output(base.bias)
        else:
            plain = self.apply(dropped, Dense(base.weight))
        gain = site.along_output(gain)
        return (y + (gain - 1) * plain + gain * self.apply(dropped, delta)).to(y.dtype)

    def _fused(self, x: Tensor, p: P, delta: Delta, gain: Tensor | None) -> Tensor | None:
        """Take the fused path, if there is one for this layer, this update and this input."""
        layer = self.layer
        if not layer.kind.multiplies or not self.is_base or torch.compiler.is_compiling():
            return None
        if input_reason(x) is not None or delta_reason(delta) is not None:
            return None
        drop = active_dropout(p)
        bias = None
        if gain is not None:
            if drop is not None and not layer.state.policy.own_dropout:
                return None  # PEFT also drops the input of the base product
            bias = self.base_affine().bias
            if type(gain) is not Tensor:
                return None
        assert isinstance(delta, LowRank)
        updates = Updates([delta], [drop], fused_dtype(layer, [delta], x))
        return run_updates(layer, (self.chain[0],), updates, x, self.args, self.kwargs, gain, bias)

    def apply(self, x: Tensor, delta: Delta) -> Tensor:
        """Return the update's share of the output for input ``x``."""
        layer = self.layer
        return apply_delta(layer.kind, self._leaf(x), self.site, x, delta, layer.compute)

    def _leaf(self, x: Tensor) -> Any:
        """Return the module that holds the layer's tensors, or what stands for it in this call."""
        layer = self.layer
        leaf = layer.leaf_layer
        return layer.kind.called(leaf, x, self.args, self.kwargs) if layer.kind.takes_arguments else leaf

    def down(self, x: Tensor, A: Tensor) -> Tensor:
        """Take an input down to the rank of A, (r, fan_in) or one for each sample; see ``kernels.halves``."""
        layer, dtype = self.layer, self.product_dtype(x, A.dtype)
        if layer.site.lookup and layer.compute == "base":
            dtype = layer.kind.weight_dtype(layer.leaf_layer) or dtype
        return down(layer.kind, self._leaf(x), self.site, x, A.to(dtype))

    def up(self, t: Tensor, B: Tensor) -> Tensor:
        """Take what :meth:`down` returned up to the output, by B, (out, r) or one for each sample."""
        return up(self.layer.leaf_layer, self.site, t, B.to(t.dtype))

    def ranks_last(self, t: Tensor) -> Tensor:
        """Turn what :meth:`down` returned so that its last axis is the rank's."""
        return ranks_last(self.site, t)

    def tasks(self, x: Tensor) -> Tensor | None:
        """Return the task of each row of the layer's input, (rows,), or None where none was chosen."""
        return tasks_of(self.layer, self._leaf(x).samples if self.site.pooled else x)

    def product_dtype(self, x: Tensor, adapter: torch.dtype) -> torch.dtype:
        """Return the dtype in which products of ``x`` with an adapter's tensors run."""
        return product_dtype(x, adapter, self.layer.compute)

    def decide(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply a function without gradient to tensors, each of them whole."""
        return decide(function, *tensors)

    def in_blocks(self, x: Tensor, size: int, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply a function of blocks (..., n / size, size) to features (..., n); no block lies on two processes."""
        return in_blocks(x, size, function)

    def affine(self) -> Affine:
        """Return the map of what is below, in weight space."""
        return self.layer.fold(self.chain[: self.depth])

    def bias(self) -> Tensor | None:
        """Return the bias of what is below, (out,), or None."""
        return None if self.depth == 0 and not self.site.bias else self.affine().bias

    def base_affine(self) -> Affine:
        """Return the map of the untouched layer."""
        return self.layer.base_affine()

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        """Run the layer with another map."""
        return self.layer.kind.run(self.layer.leaf_layer, self.site, affine, x, self.args, self.kwargs)
