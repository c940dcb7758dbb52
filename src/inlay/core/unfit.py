"""Why a place that a pattern chose cannot be adapted, whatever the method's mathematics says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from inlay.core.affine import Site
from inlay.core.choose import model_type
from inlay.core.kind import Kind, kind_of
from inlay.core.method import Method
from inlay.core.nest import takes_dropout
from inlay.core.readers import fused_reader, may_be_fused
from inlay.core.registry import load_installed
from inlay.core.targets import Place
from inlay.errors import TargetError

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["found_kind", "unreadable", "weightless"]


def found_kind(place: Place, pattern: str) -> Kind:
    """Return a kind for a module that none claims: one of another package, or what a trial of the module finds.

    Raises:
        TargetError: there is none.
    """
    base = place.base
    kind = kind_of(base) if load_installed() else None
    if kind is None:
        from inlay.kinds.probed import probed

        kind = probed(place.path, base)
    if kind is None:
        raise TargetError(
            f"{place.path!r}, matched by {pattern!r}, is a {type(base).__name__}, which is no layer that can be "
            "adapted (supported: linear, convolution, embedding, norm and attention layers); name the layers inside it"
        )
    return kind


def weightless(made: Plan, kind: Kind, site: Site, method: Method, base: nn.Module) -> str | None:
    """What belongs to a forward pass has no place where only the weight is rewritten."""
    if kind.activation:
        return None
    if method.samples and not getattr(made.config, "inference_mode", False):
        return f"{type(method).__name__} draws noise in a forward pass, and here the layer only gets another weight"
    if method.own_backward and not getattr(made.config, "inference_mode", False):
        return f"{type(method).__name__} trains from the layer's input, and here the layer only gets another weight"
    if not method.mergeable:
        return f"{type(method).__name__} depends on the layer's input, and here the layer only gets another weight"
    if not site.bias and "bias" in method.slots(site):
        return "the update has a bias, and here the layer only gets another weight and has no bias of its own"
    if kind.peft_skips_dropout and made.policy.peft_layers:
        return None
    if getattr(made.config, "inference_mode", False):
        return None  # it does not train, so nothing is dropped
    for name in (method.dropout_field, "module_dropout", "rank_dropout"):
        value = getattr(method.config, name, None) if name is not None else None
        if value and name == method.dropout_field and takes_dropout(made.policy, base, site):
            continue
        if value:
            return f"{name}={value} acts on a forward pass, and here the layer only gets another weight; set it to 0"
    return None


def unreadable(made: Plan, place: Place) -> str | None:
    """A layer whose owner reads its weight and never calls it would be adapted in silence and in vain."""
    for parent, _ in place.parents:
        if isinstance(parent, nn.MultiheadAttention) and made.policy.strict_targets:
            owner = place.path.rpartition(".")[0]
            return f"nn.MultiheadAttention reads this layer's weight and never calls it; target {owner!r} instead"
    if may_be_fused(place.path) and fused_reader(family := model_type(made.model), place.path):
        return f"the fused kernels of {family} models read this layer's weight and never call it; leave it out"
    return None
