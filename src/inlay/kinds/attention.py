"""``nn.MultiheadAttention``: packed input projections, and an output projection that is read and never called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.call import call_in_force
from inlay.core.clone import call_with, shallow_clone
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.nest import rewritten
from inlay.core.route import split_rows
from inlay.core.state import State
from inlay.errors import RoutingError, UnsupportedError
from inlay.kinds.linear import Linear
from inlay.kinds.whole import Whole

__all__ = ["Attention", "AttentionLayer", "Output", "OutputLayer"]


class Attention(Whole):
    """Weight (3 * embed, embed), the projections of query, key and value on top of each other.

    ``out_proj`` is a second site, adapted in place inside the layer; both are applied in weight space, because the
    module hands its weights to one fused function.
    """

    name = "attention"
    peft_skips_dropout = True
    weight_name = "in_proj_weight"
    bias_name = "in_proj_bias"

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward

    def site(self, name: str, module: nn.Module) -> Site:
        assert isinstance(module, nn.MultiheadAttention)
        if not module._qkv_same_embed_dim:
            raise UnsupportedError(
                f"{name!r} is an nn.MultiheadAttention whose kdim={module.kdim} or vdim={module.vdim} differs from its "
                f"embed_dim={module.embed_dim}, so it holds three projections apart and has no packed one to adapt"
            )
        return Site(name, self.name, 3 * module.embed_dim, module.embed_dim, bias=module.in_proj_bias is not None)

    def adapt(self, module: nn.Module, site: Site, state: State) -> AdaptedLayer:
        return AttentionLayer(module, self, site, state)

    def routed(
        self,
        layer: Any,
        names: tuple[str, ...],
        run: Callable[[str, tuple[Any, ...], dict[str, Any]], Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Serve each sample by its adapter: the batch axis of every argument is brought to the front and back."""
        given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        query = given["query"]
        if query.dim() != 3:
            raise RoutingError(
                f"adapters were chosen for {len(names)} samples, but an attention layer received a query of shape "
                f"{tuple(query.shape)}, which has no batch axis"
            )
        turned = not layer.batch_first
        mask = given.get("attn_mask")
        by_sample = mask is not None and mask.dim() == 3  # (batch * heads, target, source)
        batched = {name: given[name].transpose(0, 1) if turned else given[name] for name in _ARGUMENTS[:3]}
        if given.get("key_padding_mask") is not None:
            batched["key_padding_mask"] = given["key_padding_mask"]
        if mask is not None and by_sample:
            batched["attn_mask"] = mask.unflatten(0, (-1, layer.num_heads))
        # a mask that all samples share may have as many rows as there are samples, so it must not be split
        common = {name: value for name, value in given.items() if name not in batched}

        def part(name: str, _: tuple[Any, ...], own: dict[str, Any]) -> Any:
            own = dict(own)
            if turned:
                own |= {role: own[role].transpose(0, 1) for role in _ARGUMENTS[:3]}
            if by_sample:
                own["attn_mask"] = own["attn_mask"].flatten(0, 1)
            output, weights = run(name, (), {**common, **own})
            return (output.transpose(0, 1) if turned else output), weights

        output, weights = split_rows("attention", names, part, (), batched)
        return (output.transpose(0, 1) if turned else output), weights


class Output(Linear):
    """The output projection inside an adapted attention layer."""

    all_linear = False

    def claims(self, module: nn.Module) -> bool:
        return False  # planned along with its attention layer

    def adapt(self, module: nn.Module, site: Site, state: State) -> AdaptedLayer:
        return OutputLayer(module, self, site, state)


class OutputLayer(AdaptedLayer):
    """An output projection with adapters; it is read by its attention layer and never called."""

    def fold(self, chain: tuple[Entry, ...], dtype: torch.dtype | None = None, whole: bool = False) -> Affine:
        if self.state.policy.peft_layers:
            # PEFT adds an update here twice, in forward and in merges, and its checkpoints were trained so.
            chain = tuple(e for entry in chain for e in [entry] * (2 if entry.method.additive else 1))
        return super().fold(chain, dtype, whole)


_ARGUMENTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")


class AttentionLayer(AdaptedLayer):
    """Attention with adapters. The adapted ``out_proj`` inside it never runs: its map is read from here."""

    @property
    def _qkv_same_embed_dim(self) -> bool:
        return True  # nn.TransformerEncoderLayer asks for it

    @property
    def output(self) -> AdaptedLayer | None:
        """The adapted output projection."""
        found = self.base_layer._modules["out_proj"]
        return found if isinstance(found, AdaptedLayer) else None

    @property
    def _parts(self) -> list[AdaptedLayer]:
        return [self] if self.output is None else [self, self.output]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the input and the output projections, by default the active ones."""
        from inlay.core.merge import merge_layers

        merge_layers(self._parts, list(self.active) if adapter_names is None else adapter_names)

    def unmerge(self) -> None:
        """Put the original weights of both projections back, bitwise."""
        for part in self._parts:
            part.restore()

    def _run(self, chain: tuple[Entry, ...], args: tuple[Any, ...], kwargs: dict[str, Any], off: bool = False) -> Any:
        after: dict[str, Tensor] = {}
        if self.output is not None:
            hidden = off or not self.output.enabled
            after = rewritten(
                self.output, () if hidden else self.output.chain(call_in_force(self.state, self.training)), hidden
            )
        return self._attend(rewritten(self, chain, off), after, args, kwargs)

    def _run_named(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        after: dict[str, Tensor] = {}
        if self.output is not None:
            after = rewritten(self.output, self.output.entries.get(name, ()), False)
        return self._attend(rewritten(self, self.entries.get(name, ()), False), after, args, kwargs)

    def _attend(
        self, before: dict[str, Tensor], after: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run the attention with rewritten input (``before``) and output (``after``) projections."""
        module = self.base_layer
        if not before and not after:
            return module(*args, **kwargs)
        if torch.compiler.is_compiling():
            path = "out_proj" if self.output is None else "out_proj.base_layer"
            tensors = dict(before)  # older dynamo traces no union of dicts
            tensors.update({f"{path}.{name}": tensor for name, tensor in after.items()})
            return call_with(module, tensors, args, kwargs)
        leaf: Any = module.out_proj if self.output is None else self.output.leaf_layer
        return shallow_clone(module, before, {"out_proj": shallow_clone(leaf, after)})(*args, **kwargs)
