"""Shrinking intruder dimensions: directions of an adapted weight that the pretrained one does not have.

A singular vector of ``W + BA`` that resembles none of ``W`` is an intruder; such directions go with forgetting what was
learned before. Shrinking them trades a little of the new task for it (Shuttleworth et al. 2024, arXiv:2410.21228).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from inlay.combine.configs import derived
from inlay.combine.lora import write_factors
from inlay.combine.parts import part_of
from inlay.combine.placing import carry, check_layers, check_tied, entries, layers_of, plan_exactly, put
from inlay.combine.svd import factorise
from inlay.config.variants import NO_VARIANT
from inlay.core.dtype import merge_dtype
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.state import State
from inlay.errors import ConfigError, UnsupportedError

__all__ = ["reduce_intruder_dimension"]


def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], object] | None = print,
) -> None:
    """Add a copy of a LoRA adapter whose intruder dimensions are shrunk, and activate it.

    Args:
        peft_model: a ``PeftModel`` with the adapter.
        old_adapter_name: the adapter; it stays as it is.
        new_adapter_name: the copy's name.
        top_k: how many of the largest singular vectors of each adapted weight are looked at.
        threshold_epsilon: an intruder's cosine with every singular vector of the base weight is below this, 0 to 1.
        mitigation_lambda: what an intruder is multiplied with, 0 to 1: 0 takes it away, 1 keeps it.
        logging_sink: is called with a line for each layer; None for silence.

    Raises:
        UnsupportedError: another method than LoRA, or a kind of LoRA whose update is not one matrix beside the base's
            (DoRA, bare parameters, grouped convolutions, a scale of 0).
        CombinationError: one of the adapter's layers is one that others wrote.
        UnknownAdapterError: there is no such adapter.
        AdapterNameError: the new name is taken or unsafe.
        ConfigError: a number out of range. In each case the model is as before.
    """
    lines: list[str] = []

    def make(model: nn.Module, state: State) -> None:
        options = (top_k, threshold_epsilon, mitigation_lambda)
        lines.extend(_add_shrunk(model, state, old_adapter_name, new_adapter_name, *options))

    peft_model.base_model.add_computed(make)
    peft_model.set_adapter(new_adapter_name)
    for line in (*lines, f"adapter {new_adapter_name!r} is active now"):
        if logging_sink is not None:
            logging_sink(line)


def _add_shrunk(
    model: nn.Module, state: State, old_name: str, new_name: str, top_k: int, threshold: float, keep: float
) -> list[str]:
    """Put the shrunk copy into the model and return a line for each layer."""
    config = state.record(old_name).config
    check_layers(state, [old_name])
    held = [(layer, entry) for layer in layers_of(model) for entry in entries(layer, old_name, "LORA")]
    _check(config, [entry for _, entry in held], top_k)
    for what, number in (("threshold_epsilon", threshold), ("mitigation_lambda", keep)):
        if not 0 <= number <= 1:
            raise ConfigError(f"{what}: expected a number from 0 to 1, found {number!r}")
    wide = any(layer.params(entry).A.dtype.itemsize >= 4 for layer, entry in held)
    made = plan_exactly(model, derived(config, **NO_VARIANT), new_name, {e.site.name for _, e in held}, autocast=wide)
    lines: list[str] = []

    def fill(state: State) -> None:
        check_tied(model, new_name, [old_name])
        for layer in layers_of(model):
            for entry in entries(layer, new_name, "LORA"):
                if entry.home is None:
                    old = entries(layer, old_name, "LORA")[0]
                    found = _fill_layer(layer, old, entry, top_k, threshold, keep)
                    lines.append(f"{layer.site.name}: {found or 'no'} intruder dimension{'s' * (found != 1)}")
        carry(model, state, new_name, [old_name], [1.0])

    put(made, fill)
    return lines


def _check(config: Any, held: list[Entry], top_k: int) -> None:
    name = getattr(config.peft_type, "value", config.peft_type)
    if name != "LORA":
        raise UnsupportedError(f"intruder dimensions are reduced in LoRA adapters only, and this one is of {name}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ConfigError(f"top_k: expected a whole number above 0, found {top_k!r}")
    if config.use_dora:
        raise UnsupportedError(
            "DoRA scales the rows of the weight too, so its change is no low-rank matrix to shrink in"
        )
    for entry in held:
        if entry.site.parameter is not None or entry.site.groups > 1:
            what = "a bare parameter" if entry.site.parameter is not None else "a convolution with groups"
            raise UnsupportedError(f"{entry.site.name!r} is {what}, whose update is not one matrix beside the weight")
        if not entry.method.options(entry.site)["scaling"]:
            raise UnsupportedError(f"{entry.site.name!r}: lora_alpha is 0, so the adapter changes nothing to shrink in")


def _fill_layer(layer: AdaptedLayer, old: Entry, new: Entry, top_k: int, threshold: float, keep: float) -> int:
    """Write the shrunk update of one layer and return how many intruders it had."""
    part = part_of(layer, old)
    base = layer.base_affine(whole=True).weight
    base = base.to(merge_dtype(base.dtype))
    scale = float(new.options["scaling"])
    update = part.scale * (part.B.to(base.dtype) @ part.A.to(base.dtype))
    before = torch.linalg.svd(base, full_matrices=False).U
    U, S, Vh = torch.linalg.svd(base + update, full_matrices=False)
    nearest = (U[:, :top_k].mT @ before).abs().amax(dim=1)
    intruders = (nearest < threshold).nonzero().flatten()
    if len(intruders):
        shrunk = (U[:, intruders] * S[intruders]) @ Vh[intruders]
        rest = (update + (keep - 1.0) * shrunk) / scale
        U, S, Vh = factorise(rest, part.A.shape[0])
        root = S.sqrt()  # the same share for both factors, so that neither trains at a pace of its own
        factors = (U * root, root.unsqueeze(-1) * Vh)
    else:
        factors = (part.B * (part.scale / scale), part.A)
    p = write_factors(layer, new, factors)
    if part.bias is not None:
        p.bias.copy_(part.bias / scale)
        layer.put(new, p)
    return len(intruders)
