"""Parts of a model that were given adapters separately become one, when an adapter is injected into the whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from inlay.core.shared import register_shared, shared_names, unregister_shared
from inlay.core.state import State
from inlay.core.targets import first_standing, standing
from inlay.errors import AdapterNameError, StateError

__all__ = ["check_joinable", "joined", "offsets"]


def check_joinable(states: list[State]) -> None:
    """Refuse states that cannot become one.

    Raises:
        AdapterNameError: two of them have an adapter of the same name.
        StateError: their policies differ, one belongs to a wrapper, or one has replicated layers.
    """
    if len(states) < 2:
        return
    names = [name for state in states for name in state.records]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise AdapterNameError(
            "parts of this model were given adapters separately, and they cannot be joined: both have "
            f"{', '.join(map(repr, twice))}; delete or rename one"
        )
    for state in states[1:]:
        if state.policy != states[0].policy:
            raise StateError(
                f"parts of this model were given adapters under the policies {states[0].policy.name!r} and "
                f"{state.policy.name!r}, so they cannot be joined"
            )
    for state in states:
        reason = "a wrapper holds it" if state.wrapped else "its layers are replicated" if state.replication else None
        if reason is not None:
            raise StateError(
                f"the part of this model that has {', '.join(map(repr, state.records))} cannot be joined with another: "
                f"{reason}"
            )


def offsets(state: State, model: nn.Module) -> tuple[str, str]:
    """Compare the root that a state's names start from with ``model``.

    Returns:
        What to put before the state's names (``model`` is larger than its root was), and what to put before the
        model's names (it is a part of it). At most one is not empty.
    """
    if next(state.layers(), None) is None:
        return "", ""
    first = first_standing(model)
    if first is None or (first[1].state is state and first[1].site_path == first[0]):
        return "", ""
    for place, follower in standing(model):
        if follower.state is not state:
            continue
        known = follower.site_path
        for path in (place.path, *place.aliases):
            if path == known:
                return "", ""
            if path.endswith(f".{known}"):
                return path[: -len(known)], ""
            if known.endswith(f".{path}"):
                return "", known[: -len(path)]
    return "", ""


def joined(model: nn.Module, states: list[State]) -> State | None:
    """Return the one state of a model, joining those of its parts; nothing that any part computes changes.

    Raises:
        AdapterNameError, StateError: they cannot be joined; nothing was changed.
    """
    check_joinable(states)
    if not states:
        return None
    first = states[0]
    for state in states:
        before, _ = offsets(state, model)
        if before:
            state.base_grad = {before + name: flag for name, flag in state.base_grad.items()}
            state.base_values = {before + name: value for name, value in state.base_values.items()}
            for record in state.records.values():
                record.rebased = {before + name: value for name, value in record.rebased.items()}
            _rename(state, before)
    for state in states[1:]:
        _take_over(first, state, model)
    return first


def _rename(state: State, before: str) -> None:
    """Let the layers of a state know their paths from a larger root."""
    for layer in state.layers():
        layer.move_below(before)


def _take_over(first: State, other: State, model: nn.Module) -> None:
    for module in model.modules():
        if shared_names(module):
            unregister_shared(module, other)
    if other.enabled != first.enabled:
        for layer in other.layers():
            layer.override(enabled=layer.enabled)
    for layer in list(other.layers()):
        layer.change_state(first)
    first.records |= other.records
    first.training |= other.training
    first.active += other.active
    first.base_grad |= other.base_grad
    first.base_values |= other.base_values
    for name, container in other.shared._modules.items():
        held: Any = first.shared._modules.setdefault(name, container)
        if held is not container:
            for table in ("_modules", "_parameters", "_buffers"):
                getattr(held, table).update(getattr(container, table))
            held._non_persistent_buffers_set |= container._non_persistent_buffers_set  # type: ignore[union-attr]
    register_shared(model, first)
    first.touch()
