"""How a module runs whose parameters are adapted: in token space where its banks allow it, else with rewritten ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from inlay.core.affine import LowRank, Site
from inlay.core.clone import call_with
from inlay.core.entry import Entry
from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    from inlay.core.layer import AdaptedLayer
    from inlay.core.policy import Policy
    from inlay.kernels.experts import BankUpdate

__all__ = ["Nested", "rewritten", "run_nest", "takes_dropout", "why_generic"]

# a layer of the nest, the chain over it, and whether the untouched parameter is asked for
Nested: TypeAlias = "tuple[AdaptedLayer, tuple[Entry, ...], bool]"


def rewritten(layer: AdaptedLayer, chain: tuple[Entry, ...], off: bool) -> dict[str, Tensor]:
    """Return the layer's parameters with a chain over them, by name, in their stored dtype; empty if none changes.

    ``off`` asks for the untouched layer, also while something is merged into it.
    """
    if off:
        if not layer.merged:
            return {}
        affine = layer.base_affine()
    elif chain:
        affine = layer.fold(chain)
    else:
        return {}
    leaf = layer.leaf_layer
    stored = layer.kind.stored(leaf, layer.site, affine)
    return {name: tensor.to(getattr(leaf, name).dtype) for name, tensor in stored.items()}


def run_nest(leaf: nn.Module, nest: list[Nested], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a module with adapters on its parameters: banks of experts in token space, all others rewritten.

    Raises:
        UnsupportedError: a dropout is on, and the parameter has to be rewritten.
    """
    from inlay.kernels import experts, experts_forms

    updates: dict[str, list[experts.BankUpdate]] = {}
    tensors: dict[str, Tensor] = {}
    inputs = None
    form = experts_forms.form_of(leaf)
    reason = why_not_in_token_space(leaf) if any(chain for _, chain, _ in nest) else ""
    if reason is None and form is not None:
        inputs = form.bind(args, kwargs)
        reason = None if inputs is not None else "the module was called in another way than with matrices alone"
    for layer, chain, off in nest:
        found: list[experts.BankUpdate] | str | None = reason
        if reason is None and chain and not off:
            found = bank_updates(layer, chain)
        if isinstance(found, list):
            updates[layer.kind.weight_name] = found
            continue
        if not off:
            _check_dropout(layer, chain, found)
        tensors.update(rewritten(layer, chain, off))
    # a graph cannot hold a copy of the module, and token space has no gradient for a bank
    if updates and (
        (tensors and torch.compiler.is_compiling())
        or any(tensor.requires_grad for name, tensor in tensors.items() if form is not None and name in form.banks)
    ):
        for layer, chain, off in nest:
            if layer.kind.weight_name in updates:
                _check_dropout(layer, chain, "as another parameter of the module has to be")
                tensors.update(rewritten(layer, chain, off))
        updates = {}
    if updates:
        assert form is not None
        assert inputs is not None
        follows = experts_forms.follows_autocast(leaf)
        return experts.run_in_token_space(form, leaf, tensors, updates, inputs, follows)
    return call_with(leaf, tensors, args, kwargs) if tensors else leaf(*args, **kwargs)


def why_not_in_token_space(leaf: nn.Module) -> str | None:
    """Return why the banks of a module are not adapted in token space at present, or None."""
    from inlay.kernels.experts_forms import why_not
    from inlay.kernels.switch import fast_paths_on

    if not fast_paths_on():
        return "fast paths are switched off"
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is active"
    return why_not(leaf)


def bank_updates(layer: AdaptedLayer, chain: tuple[Entry, ...]) -> list[BankUpdate] | str:
    """Return what a chain adds to a bank, or why it can only be written into it."""
    from inlay.kernels.experts import BankUpdate
    from inlay.kernels.experts_forms import form_of

    form = form_of(layer.leaf_layer)
    if form is None or layer.kind.weight_name not in form.banks or len(layer.site.experts) != 1:
        return f"{layer.kind.weight_name} is no bank of experts"
    updates = []
    for entry in chain:
        method = entry.method
        delta = None
        if method.additive and method.mergeable:
            p = layer.params(entry)
            delta = method.update(entry.site, p)
        if not isinstance(delta, LowRank) or delta.groups != 1 or delta.bias is not None:
            return f"the update of {entry.name!r} ({type(method).__name__}) is not low-rank"
        if type(delta.A) not in (nn.Parameter, Tensor) or type(delta.B) not in (nn.Parameter, Tensor):
            return f"the factors of {entry.name!r} are spread over processes"
        updates.append(BankUpdate(delta, drop_probability(layer, entry), layer.site.transposed))
    return updates


def takes_dropout(policy: Policy, leaf: nn.Module, site: Site) -> bool:
    """Whether adapters of a parameter are meant to be multiplied into rows, which may lose elements; PEFT has none."""
    from inlay.kernels.experts_forms import form_of

    form = None if site.parameter is None or policy.peft_layers else form_of(leaf)
    return form is not None and site.parameter in form.banks and (form.refuse is None or form.refuse(leaf) is None)


def drop_probability(layer: AdaptedLayer, entry: Entry) -> float:
    """Return the probability of the dropout that is on for an adapter, 0 for none."""
    field = entry.method.dropout_field
    held = None if field is None else layer._modules.get(field)
    dropout = None if held is None else held._modules.get(entry.name)
    return float(getattr(dropout, "p", 0.0)) if dropout is not None and dropout.training else 0.0


def why_generic(layer: AdaptedLayer) -> str | None:
    """Return why a parameter is rewritten in each forward rather than adapted in token space, or None."""
    reason = why_not_in_token_space(layer.leaf_layer)
    if reason is None:
        chain = layer.chain() or tuple(entry for entries in layer.entries.values() for entry in entries)
        found = bank_updates(layer, chain)
        reason = found if isinstance(found, str) else None
    return reason


def _check_dropout(layer: AdaptedLayer, chain: tuple[Entry, ...], reason: str | None) -> None:
    for entry in chain:
        p = drop_probability(layer, entry)
        if p:
            raise UnsupportedError(
                f"{layer.site.name!r}: {entry.method.dropout_field}={p:g} of {entry.name!r} acts on the rows that a "
                f"bank multiplies, and here the parameter is rewritten: {reason}; set it to 0"
            )
