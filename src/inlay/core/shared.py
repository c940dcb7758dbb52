"""Tensors that several layers of a model use: registered once, at a root, and held by the state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from inlay.core.sliced import own_method, own_site
from inlay.core.state import State
from inlay.errors import StateError, UnsupportedError

if TYPE_CHECKING:
    from inlay.core.plan import Plan

__all__ = ["register_shared", "share_out", "shared_names", "unregister_shared"]

_NAMES = "_shared_names"


def shared_names(holder: nn.Module) -> tuple[str, ...]:
    """Return the names of the children that are shared tensors and no part of the model."""
    return holder.__dict__.get(_NAMES, ())


def share_out(plan: Plan) -> None:
    """Find the tensors that the sites of a plan share, and which of them each site uses."""
    own = [placement for placement in plan.placements if own_method(placement.method) is plan.method]
    sites = [own_site(placement.method, placement.site) for placement in own]
    plan.shared = plan.method.shared_slots(sites)
    for placement in own if plan.shared else ():
        placement.shared = placement.method.shared_at(placement.site, plan.shared)
    lent = plan.method.borrows(sites)
    named = {placement.site.name: placement for placement in own} if lent else {}
    for name, roles in lent.items():
        named[name].borrowed = {role: named[lender] for role, lender in roles.items()}


def register_shared(root: nn.Module, state: State) -> None:
    """Make the state's shared tensors children of the model, or of its wrapper, so that they move and save with it.

    Raises:
        UnsupportedError: the model is an ``nn.Sequential``, which takes every child for a layer.
        StateError: there is an attribute of the name that a shared tensor needs.
    """
    holder = state.holder(root)
    if holder is not root:
        _drop_names(root)
    known = shared_names(holder)
    new = state.shared._modules
    if new and isinstance(holder, nn.Sequential):
        raise UnsupportedError(
            "these adapters share tensors, which become children of the model, and an nn.Sequential would call them as "
            "layers; put it into another module, or use get_peft_model"
        )
    for name in new:
        if name not in known and hasattr(holder, name):
            raise StateError(
                f"{type(holder).__name__} already has an attribute {name!r}, which is the name of tensors that its "
                "adapters share"
            )
    _drop_names(holder)
    if new:
        holder._modules.update(new)
        holder.__dict__[_NAMES] = tuple(new)


def unregister_shared(root: nn.Module, state: State) -> None:
    """Undo :func:`register_shared`."""
    for holder in (root, state.holder(root)):
        _drop_names(holder)


def _drop_names(holder: nn.Module) -> None:
    for name in holder.__dict__.pop(_NAMES, ()):
        holder._modules.pop(name, None)
