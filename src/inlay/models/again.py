"""Wrapping a model again, and giving an adapter's name to another one: what people do who run a cell twice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from inlay.core.active import set_active
from inlay.core.policy import Policy
from inlay.core.state import State, find_state
from inlay.errors import InlayWarning, StateError
from inlay.models import operate

__all__ = ["replaced", "unwrapped"]


def unwrapped(model: Any, wrapped: bool, policy: Policy) -> nn.Module:
    """Return the bare model, of a wrapper too where the policy lets it be wrapped again; that warns.

    Raises:
        StateError: it is a wrapper (``wrapped``), and the policy does not.
    """
    if not wrapped:
        return model
    if not policy.starts_over:
        raise StateError(
            f"the model is a {type(model).__name__} already: use its add_adapter, or get_base_model() to start over"
        )
    warnings.warn(
        f"the model is a {type(model).__name__} already; the model inside is wrapped again, with the adapters in it",
        InlayWarning,
        stacklevel=5,
    )
    return model.get_base_model() if hasattr(model, "get_base_model") else model.model


@contextmanager
def replaced(root: nn.Module, name: str, policy: Policy) -> Iterator[None]:
    """Make room for an adapter of a taken name, where the policy says so; if the block fails, the old one is back."""
    state = find_state(root) if policy.starts_over else None
    if state is None or name not in state.records:
        yield
        return
    from inlay.checkpoint import get_peft_model_state_dict, load_tensors

    record, active = state.records[name], state.active
    tensors = {key: value.clone() for key, value in get_peft_model_state_dict(root, adapter_name=name).items()}
    warnings.warn(f"there is an adapter {name!r} already, which is replaced", InlayWarning, stacklevel=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InlayWarning)  # of what is active meanwhile
        operate.remove(root, state, name)
    try:
        yield
    except BaseException:

        def fill(restored: State) -> None:
            load_tensors(root, tensors, name, strict=False)

        set_active(operate.add(root, record.config, name, policy=state.policy, then=fill), active)
        raise
