"""What trains beside a method's own layers: full copies of modules and token rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from inlay.core.active import adapter_parameters
from inlay.core.build import build
from inlay.core.extend import plan_extras
from inlay.core.inject import occupy
from inlay.core.plan import Plan
from inlay.core.policy import PEFT
from inlay.core.registry import method_class
from inlay.core.state import Record, State, find_state
from inlay.models.root import mark

__all__ = ["add_extras", "set_additional_trainable_modules"]


def add_extras(model: nn.Module, config: Any, adapter: str, state: State, method: Any, low_memory: bool) -> None:
    """Give an adapter that is in a model its full copies of modules and its token rows; they train."""
    made = Plan(model, adapter, config, method, state.policy, state, True)
    plan_extras(made)
    if not made.placements and not made.copies:
        return
    seed = torch.initial_seed()
    built = [(placement, build(made, placement, low_memory, True, seed)) for placement in made.placements]
    occupy(made, state, built, [])
    for name, value in made.resolved.items():
        setattr(config, name, value)
    state.touch()


def set_additional_trainable_modules(
    model: nn.Module, peft_config: Any, model_config: Any, adapter_name: str, activate_adapter: bool = True
) -> None:
    """Give an adapter what ``modules_to_save`` and ``trainable_token_indices`` of its configuration ask for.

    Args:
        model: the bare model.
        peft_config: the configuration.
        model_config: accepted for callers of PEFT; the model itself is asked.
        adapter_name: the adapter, which need not be in the model yet.
        activate_adapter: let it run and train.

    Raises:
        TargetError: a name matches nothing, or what it matches cannot be trained.
    """
    state = find_state(model) or State(policy=PEFT)
    if adapter_name not in state.records:
        method = method_class(peft_config.peft_type)(peft_config)
        state.records[adapter_name] = Record(peft_config, method, torch.initial_seed())
        state.training.add(adapter_name)
    if activate_adapter and adapter_name not in state.active:
        state.active = (*state.active, adapter_name)
    add_extras(model, peft_config, adapter_name, state, state.records[adapter_name].method, False)
    if not activate_adapter:
        for parameter in adapter_parameters(state, [adapter_name]):
            parameter.requires_grad_(False)
    mark(model, state)
