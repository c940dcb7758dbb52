"""How many parameters train, and whether that is what adapters are for."""

from __future__ import annotations

import warnings

from torch import nn

from inlay.core.active import adapter_parameters
from inlay.core.state import find_state
from inlay.errors import InlayWarning

__all__ = ["count", "diagnose", "show"]


def numel(parameter: nn.Parameter) -> int:
    """Return the logical number of elements: partitioned and packed parameters are counted in full."""
    number = parameter.numel()
    if number == 0 and hasattr(parameter, "ds_numel"):
        number = parameter.ds_numel
    if type(parameter).__name__ == "Params4bit":
        storage = getattr(parameter, "quant_storage", None)
        number *= 2 * (storage.itemsize if storage is not None else parameter.element_size())
    return int(number)


def count(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trainable and of all parameters."""
    trainable = total = 0
    for parameter in model.parameters():
        number = numel(parameter)
        total += number
        trainable += number if parameter.requires_grad else 0
    return trainable, total


def show(model: nn.Module) -> None:
    """Print both numbers in PEFT's format, and warn about what :func:`diagnose` finds."""
    trainable, total = count(model)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")
    for finding in diagnose(model):
        warnings.warn(finding, InlayWarning, stacklevel=3)


def diagnose(model: nn.Module) -> list[str]:
    """Return what is wrong with what trains, one sentence each; an empty list if nothing is."""
    state = find_state(model)
    trainable, total = count(model)
    if state is None or not state.records:
        return ["no target: the model has no adapters, so there is nothing for them to train"]
    if trainable == total:
        return [
            "all parameters are trainable: the base model is not frozen, so this is full fine-tuning with adapters on "
            "top; something called requires_grad_(True) on it after the adapters were added"
        ]
    if trainable == 0:
        names = ", ".join(map(repr, state.active)) or "none"
        return [
            f"no parameter is trainable (active: {names}): the adapters were loaded or set for inference, or none is "
            "active; use set_adapter, set_requires_grad, or is_trainable=True when loading"
        ]
    findings = []
    own = {id(parameter) for parameter in adapter_parameters(state, list(state.records))}
    base = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own and name.rpartition(".")[2] != "bias"
    ]
    if base:
        findings.append(
            f"memory is not reduced as it could be: {len(base)} parameters of the base model are trainable "
            f"({', '.join(base[:3])}{', ...' if len(base) > 3 else ''}) and need gradients and optimiser states; "
            "freeze them, or name their modules in modules_to_save"
        )
    elif trainable > total - trainable:
        findings.append(
            f"memory is not reduced: the adapters train {trainable:,d} parameters, more than the frozen rest has; use "
            "a smaller rank or fewer target modules"
        )
    return findings
