"""Adding the slots to a model, and taking them out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from inlay.checkpoint.tree import bare_model
from inlay.core.active import adapter_parameters, set_active
from inlay.core.collect import uncollected
from inlay.core.eject import delete, eject
from inlay.core.holder import put_in_eval_mode
from inlay.core.registry import method_class
from inlay.core.state import State
from inlay.errors import ConfigError
from inlay.models import operate
from inlay.models.root import mark, unmark
from inlay.models.wrapper import Wrapper

__all__ = ["add_slots", "remove_slots"]

# Probabilities of leaving something out in training, which slots never do.
_DROPOUTS = ("lora_dropout", "module_dropout", "rank_dropout")


@uncollected
def add_slots(model: nn.Module, config: Any, count: int, autocast: bool) -> list[str]:
    """Add frozen adapters of zeros to a model and return their names; all or none.

    Raises:
        ConfigError: the config asks for more than tensors at layers.
        what :func:`inlay.plan` raises.
    """
    for field in ("modules_to_save", "trainable_token_indices", "layer_replication"):
        if getattr(config, field, None):
            raise ConfigError(f"{field}: slots hold tensors of layers only")
    if (getattr(config, "bias", "none") or "none") != "none":
        raise ConfigError(f"bias={config.bias!r}: slots hold tensors of layers only")
    if method_class(config.peft_type).variant(config)(config).rebases:
        raise ConfigError(
            f"init_lora_weights={config.init_lora_weights!r}: slots hold adapters of one base, and this start changes "
            "it; save the adapter with path_initial_model_for_weight_conversion, or set init_lora_weights=True if the "
            "base weights are the changed ones"
        )
    config = copy.deepcopy(config)
    config.inference_mode = True
    for field in _DROPOUTS:
        if hasattr(config, field):
            setattr(config, field, 0.0)
    bare, _ = bare_model(model)
    held = model.state if isinstance(model, Wrapper) else None
    names: list[str] = []
    number = 0
    active: tuple[str, ...] = ()
    try:
        while len(names) < count:
            name, number = f"slot{number}", number + 1
            if held is not None and name in held.records:
                continue
            active = () if held is None else held.active
            held = operate.add(bare, copy.deepcopy(config), name, state=held, autocast=autocast, initialise=False)
            names.append(name)
            held.records[name].slot = True
            held.active = active  # the first adapter of a model becomes active, which a slot must not
    except BaseException:
        remove_slots(model, names)
        raise
    assert held is not None
    with torch.no_grad():
        for parameter in adapter_parameters(held, names):
            parameter.zero_()
    held.touch()
    mark(bare, held)
    if not bare.training:
        put_in_eval_mode(bare, held, names)
    return names


def remove_slots(model: nn.Module, names: list[str]) -> None:
    """Take slots out of a model."""
    from inlay.core.state import find_state

    bare, _ = bare_model(model)
    state: State | None = model.state if isinstance(model, Wrapper) else find_state(bare)
    if state is None or not names:
        return
    set_active(state, [name for name in state.active if name not in names])
    if set(state.records) == set(names) and not state.wrapped:
        eject(bare, state)
        unmark(bare)
        return
    for name in names:
        delete(bare, state, name)
    mark(bare, state)
