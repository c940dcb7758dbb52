"""Putting a computed adapter into a model: its places, its values, and what it takes over from other adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inlay.combine.configs import derived
from inlay.core.active import set_trainable
from inlay.core.affine import Affine
from inlay.core.choose import choose
from inlay.core.copies import plan_copies
from inlay.core.entry import Entry
from inlay.core.fused_layouts import split_name
from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.core.part import part_matcher
from inlay.core.plan import Plan, plan
from inlay.core.registry import method_class
from inlay.core.state import State
from inlay.core.targets import places
from inlay.errors import CombinationError, InlayError, TargetError

__all__ = [
    "carry",
    "check_layers",
    "check_tied",
    "entries",
    "layers_of",
    "main_entries",
    "plan_exactly",
    "put",
    "refuse_parameters",
    "targets_exactly",
]

TOKENS = "TRAINABLE_TOKENS"


def layers_of(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Iterate over the adapted layers in the order of ``named_modules``, which random draws follow."""
    return (module for module in model.modules() if isinstance(module, AdaptedLayer))


def entries(layer: AdaptedLayer, name: str, peft_type: Any) -> list[Entry]:
    """Return what an adapter has at a layer by its own method, without the token rows beside it."""
    return [entry for entry in layer.entries.get(name, ()) if entry.method.config.peft_type == peft_type]


def main_entries(layer: AdaptedLayer, name: str) -> list[Entry]:
    """Return the same, whatever the adapter's method is."""
    record = layer.state.records.get(name)
    return [] if record is None else entries(layer, name, record.config.peft_type)


def plan_exactly(model: nn.Module, config: Any, name: str, wanted: set[str], autocast: bool) -> Plan:
    """Plan an adapter for some sites and no others.

    The configuration's own targets are kept if they mean just these sites; otherwise whole paths replace them.

    Raises:
        CombinationError: no targets mean these sites.
        what :func:`inlay.core.plan.plan` raises.
    """
    refused: InlayError | None = None
    for spelled in _spellings(config, wanted):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the adapters that this one comes from had them
                made = plan(model, spelled, name, autocast_adapter_dtype=autocast)
        except InlayError as error:
            refused = refused or error
            continue
        if {p.site.name for p in made.placements if p.method.config.peft_type == config.peft_type} == wanted:
            return made
    raise refused or CombinationError(f"no target_modules mean just the layers {', '.join(sorted(wanted)[:5])}")


def targets_exactly(model: nn.Module, state: State, config: Any, wanted: set[str]) -> Any:
    """Return the configuration with targets that mean some layers and no others; nothing has to be injectable.

    Raises:
        CombinationError: no targets mean these layers.
    """
    everything = places(model)
    for spelled in _spellings(config, wanted):
        method = method_class(config.peft_type)(spelled)
        made = Plan(model, "", spelled, method, state.policy, state, autocast=True)
        try:
            plan_copies(made, everything)
            chosen = choose(made, everything)
        except InlayError:
            continue
        if {place.path for place, _ in chosen} == wanted:
            return spelled
    raise CombinationError(f"no target_modules mean just the layers {', '.join(sorted(wanted)[:5])}")


def _spellings(config: Any, wanted: set[str]) -> Iterator[Any]:
    """Yield copies of a configuration with its own targets, with whole paths, and with an expression of just them."""
    yield derived(config)
    fields = ("exclude_modules", "layers_to_transform", "layers_pattern")
    free: dict[str, Any] = {field: None for field in fields if hasattr(config, field)}
    parts = _parts(config, wanted)
    if parts is not None:
        yield derived(config, **free, target_modules=parts)
        return
    yield derived(config, **free, target_modules=set(wanted))
    yield derived(config, **free, target_modules="|".join(map(re.escape, sorted(wanted))))


def _parts(config: Any, wanted: set[str]) -> set[str] | None:
    """Return whole paths of layers, each with the slice of it that the configuration means; None where it has none."""
    targets = config.target_modules
    if not targets or isinstance(targets, str) or not any(map(split_name, targets)):
        return None
    try:
        meant = part_matcher(targets)
    except TargetError:  # adapters of different parts of one layer come together on all of it
        return None
    found = set()
    for path in wanted:
        pattern = meant(path)
        inside = None if pattern is None else split_name(pattern)
        found.add(path if inside is None else f"{path}[{inside[1]}]")
    return found


def put(made: Plan, fill: Callable[[State], object]) -> None:
    """Inject a plan and let ``fill`` write its tensors, all or nothing; the adapter is neither active nor trains."""

    if made.method.rebases:  # its values are for the base weights as they stand
        made.config.init_lora_weights = made.method.config.init_lora_weights = True

    def then(state: State) -> None:
        record = state.records[made.adapter]
        record.frozen = bool(record.config.inference_mode)
        set_trainable(state, [made.adapter], False)
        with torch.no_grad():
            fill(state)

    inject(made, initialise=False, then=then)


# -- what stands beside the updates -----------------------------------------------------------------------------------


def refuse_parameters(state: State, adapters: Iterable[str]) -> None:
    """Low-rank updates of bare parameters are not combined.

    Raises:
        CombinationError: an adapter has some.
    """
    for name in adapters:
        given = getattr(state.record(name).config, "target_parameters", None)
        if given:
            raise CombinationError(
                f"adapter {name!r} adapts bare parameters (target_parameters={sorted(given)}), which cannot be combined"
            )


def check_layers(state: State, adapters: Iterable[str]) -> None:
    """Full copies of one module cannot be combined, and neither can layers that others wrote.

    Raises:
        CombinationError: two adapters have a copy of the same module, or one has a layer that others wrote.
    """
    adapters = list(adapters)
    for layer in state.layers():
        if not isinstance(layer, (AdaptedLayer, ModuleCopies)) and any(map(layer.has, adapters)):
            raise CombinationError(
                f"{layer.site_path!r} ({layer.type_name}) is a layer of one's own, which cannot be combined: nobody "
                "says how its tensors add up"
            )
        if isinstance(layer, ModuleCopies):
            held = [name for name in dict.fromkeys(adapters) if name in layer.modules_to_save._modules]
            if len(held) > 1:
                raise CombinationError(
                    f"{layer.path!r}: {', '.join(map(repr, held))} each have a full copy of this module "
                    "(modules_to_save), and copies cannot be combined"
                )


def check_tied(model: nn.Module, name: str, adapters: Sequence[str]) -> None:
    """A layer that uses another one's tensors can only stand for adapters that do the same.

    Raises:
        CombinationError: one has tensors of its own there.
    """
    for layer in layers_of(model):
        if any(entry.home is not None for entry in layer.entries.get(name, ())):
            for other in adapters:
                if any(entry.home is None for entry in layer.entries.get(other, ())):
                    raise CombinationError(
                        f"{layer.site.name!r} shares its weight with an embedding, and adapter {other!r} is not tied "
                        "there as the first one is (ensure_weight_tying)"
                    )


def carry(model: nn.Module, state: State, name: str, adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Fill what a new adapter has beside its updates: a full copy as it is, token rows by their weighted changes."""
    for module in state.layers():
        if isinstance(module, ModuleCopies) and name in module.modules_to_save._modules:
            for other in adapters:
                if other in module.modules_to_save._modules:
                    _copy_values(module.modules_to_save._modules[other], module.modules_to_save._modules[name])
    for layer in layers_of(model):
        for entry in entries(layer, name, TOKENS):
            if entry.home is None:
                _sum_rows(layer, entry, adapters, weights)


def _copy_values(source: Any, target: Any) -> None:
    values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, tensor in [*target.named_parameters(), *target.named_buffers()]:
        tensor.copy_(values[name])


def _sum_rows(layer: AdaptedLayer, entry: Entry, adapters: Sequence[str], weights: Sequence[float]) -> None:
    table = _table(layer, layer.base_affine(whole=True))
    changes = torch.zeros_like(table)
    for other, weight in zip(adapters, weights, strict=True):
        for held in entries(layer, other, TOKENS):
            p = layer.params(held, whole=True)
            changes[p.index] += weight * (p.rows.to(table.dtype) - table[p.index])
    p = layer.params(entry, whole=True)
    p.rows.copy_((table + changes)[p.index])
    layer.put(entry, p)


def _table(layer: AdaptedLayer, base: Affine) -> Tensor:
    """Return the rows of an embedding or an output head in float32 or wider, one for each token."""
    weight = base.weight.mT if layer.site.lookup else base.weight
    return weight.float() if weight.dtype.itemsize < 4 else weight
