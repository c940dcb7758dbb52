"""Configurations that name layers of earlier model code, rewritten for the parameters that the layers are now."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from inlay.config.types import method_name
from inlay.core.banks import Bank, Layout, has_stack, layout_of, stem
from inlay.core.kind import kind_of
from inlay.core.patterns import layer_index, matcher, pattern_key
from inlay.core.targets import ALL_LINEAR, Place, places, shortened
from inlay.errors import TargetError

__all__ = ["retargeted"]


def retargeted(
    model: nn.Module,
    config: Any,
    held: Mapping[str, Tensor] | None = None,
    prefixes: bool = False,
    everything: list[Place] | None = None,
) -> dict[str, Any]:
    """Return the fields of a configuration that names former layers, rewritten for what they are now.

    Layers that became parts of a parameter are meant by ``target_parameters``, as PEFT does for LoRA. Layers that have
    another name now are looked for where no target matches anything, or where ``held`` has their tensors.

    Args:
        model: the model.
        config: any configuration.
        held: the tensors of an adapter that is going to be loaded. They say which former layers it has, in place of
            ``target_modules``, which by itself cannot tell experts from dense layers of the same name.
        prefixes: see :func:`inlay.core.patterns.pattern_key`.
        everything: the model's places, where they are known.

    Raises:
        TargetError: a parameter can be adapted as a whole only, and the configuration wants a part of it, or other
            ranks or scales for some of its parts.
    """
    if getattr(config, "target_modules", None) is None:
        return {}
    fields: dict[str, Any] = {}
    everything = places(model) if everything is None else everything
    if method_name(config.peft_type) == "LORA" and any(map(has_stack, (model, *(p.base for p in everything)))):
        fields = _stacked(model, config, held, prefixes)
    if fields:
        config = copy.copy(config)
        for name, value in fields.items():
            setattr(config, name, value)
    return {**fields, **_renamed(model, config, held, everything)}


def _stacked(model: nn.Module, config: Any, held: Mapping[str, Tensor] | None, prefixes: bool) -> dict[str, Any]:
    """Return the fields of a LoRA that names parts of stacked parameters."""
    layout = layout_of(model)
    names = {bank: [(e, p, layout.former(path)) for e, p, path in bank.layers()] for bank in layout.banks}
    given = matcher(config.target_parameters or [])
    banks = [bank for bank in names if given(bank.path) is None]
    wanted = _wanted(config, banks, names, None if held is None else _ranks(held, layout), prefixes)
    if not wanted:
        return {}
    leaves: dict[str, bool] = {}  # whether all parameters of that name are wanted
    for bank in names:
        leaves[_leaf(bank)] = leaves.get(_leaf(bank), True) and bank in wanted
    targets = {_leaf(bank) if leaves[_leaf(bank)] else bank.path for bank in wanted}
    paths = {path for bank in wanted for _, _, former in names[bank] for path in former}
    fields: dict[str, Any] = {"target_parameters": {*(config.target_parameters or ()), *targets}}
    fields.update(_remaining(model, config, paths))
    for number, (name, default) in enumerate((("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha))):
        values = {bank: value[number] for bank, value in wanted.items()}
        fields[name] = {**_patterns(values, leaves, None if fields[name] else default), **fields[name]}
    return fields


def _leaf(bank: Bank) -> str:
    return bank.parameter if bank.experts else f"{bank.owner.rpartition('.')[2]}.{bank.parameter}"


def _wanted(
    config: Any,
    banks: Iterable[Bank],
    names: dict[Bank, list[tuple[int, int, tuple[str, ...]]]],
    ranks: dict[str, int] | None,
    prefixes: bool,
) -> dict[Bank, tuple[int, Any]]:
    """Return the banks whose former layers are asked for, with their rank and alpha."""
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        match: Any = lambda path: ALL_LINEAR  # noqa: E731
    else:
        match = matcher(config.target_modules)
    exclude = matcher(config.exclude_modules) if config.exclude_modules else lambda path: None
    layers = config.layers_to_transform
    indices = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    wanted = {}
    for bank in banks:
        asked: dict[tuple[int, int], tuple[int, float]] = {}
        for expert, part, former in names[bank]:
            rank = _by_pattern(config.rank_pattern, former, config.r, prefixes)
            if ranks is not None:
                if former[0] not in ranks:
                    continue
                rank = ranks[former[0]]
            elif (
                any(exclude(path) is not None for path in former)
                or all(match(path) is None for path in former)
                or (indices is not None and layer_index(former[0], config.layers_pattern) not in indices)
            ):
                continue
            asked[expert, part] = (rank, _by_pattern(config.alpha_pattern, former, config.lora_alpha, prefixes))
        if asked:
            wanted[bank] = _whole(config, bank, asked, ranks is None)
    return wanted


def _by_pattern(patterns: dict[str, Any] | None, paths: Iterable[str], default: Any, prefixes: bool) -> Any:
    keys = (pattern_key(patterns or (), path, prefixes) for path in paths)
    return next((patterns[key] for key in keys if patterns and key is not None), default)


def _whole(
    config: Any, bank: Bank, asked: dict[tuple[int, int], tuple[int, float]], fresh: bool
) -> tuple[int, int | float]:
    """Return rank and alpha of a bank that gives each of its former layers the rank and scale it had."""
    lacking = [path for e, p, path in bank.layers() if (e, p) not in asked]
    if fresh and lacking:
        raise TargetError(
            f"target_modules names layers that {bank.path!r} is made of now, and not {lacking[0]!r}, which is a part "
            f"of it too; name all of {', '.join(map(repr, bank.parts))}, or none"
        )
    width = [
        max((rank for (_, p), (rank, _) in asked.items() if p == part), default=0) for part in range(len(bank.parts))
    ]
    root = math.sqrt if config.use_rslora else float
    scales = {alpha / root(rank) for rank, alpha in asked.values()}
    if max(scales) - min(scales) > 1e-9 * max(map(abs, scales)):
        raise TargetError(
            f"{bank.path!r} is one parameter now, and rank_pattern or alpha_pattern gives the layers it was made of "
            f"different scales ({', '.join(f'{scale:g}' for scale in sorted(scales))})"
        )
    rank = sum(width)
    first, alpha = next(iter(asked.values()))
    whole = alpha * (math.sqrt(rank / first) if config.use_rslora else rank / first)
    return rank, int(whole) if float(whole).is_integer() else whole


def _ranks(held: Mapping[str, Tensor], layout: Layout) -> dict[str, int]:
    """Return the rank of every layer that has an ``A`` among an adapter's tensors, by its path as it is called now."""
    found = {}
    for key, tensor in held.items():
        path, role = stem(key)
        if role.startswith("lora_A."):
            found[path] = found[stem(layout.present(f"{path}.{role}"))[0]] = tensor.shape[0]
    return found


def _patterns(values: dict[Bank, Any], leaves: dict[str, bool], default: Any) -> dict[str, Any]:
    """Return a rank or alpha pattern for banks, which has what differs from the default."""
    found: dict[str, Any] = {}
    for leaf, whole in leaves.items():
        mine = {bank: value for bank, value in values.items() if _leaf(bank) == leaf}
        if whole and len(set(mine.values())) == 1:
            found[rf".*\.{re.escape(leaf)}"] = next(iter(mine.values()))
        else:
            found.update({re.escape(bank.path): value for bank, value in mine.items()})
    return {key: value for key, value in found.items() if value != default}


def _remaining(model: nn.Module, config: Any, former: set[str]) -> dict[str, Any]:
    """Return the patterns without those that meant nothing but former layers."""
    layers = [place for place in places(model) if kind_of(place.base) is not None]
    present = [path for place in layers for path in (place.path, *place.aliases)]
    found: dict[str, Any] = {}
    for name in ("target_modules", "exclude_modules"):
        patterns = getattr(config, name)
        if isinstance(patterns, str):
            if patterns.lower() != ALL_LINEAR and name == "target_modules":
                found[name] = set(_expanded(patterns, layers))
        elif patterns:
            found[name] = {p for p in patterns if _means(p, present) or not _means(p, former)}
    for name in ("rank_pattern", "alpha_pattern"):
        found[name] = {
            key: value
            for key, value in (getattr(config, name) or {}).items()
            if _keyed(key, present) or not _keyed(key, former)
        }
    return found


def _means(pattern: str, paths: Iterable[str]) -> bool:
    return any(map(matcher([pattern]), paths))


def _keyed(key: str, paths: Iterable[str]) -> bool:
    return any(pattern_key([key], path, False) is not None for path in paths)


def _expanded(expression: str, layers: list[Place]) -> list[str]:
    match = matcher(expression)
    chosen = {place.path for place in layers if match(place.path) is not None}
    return shortened(chosen, (place.path for place in layers))


# -- layers that have another name now --------------------------------------------------------------------------------


def _renamed(
    model: nn.Module, config: Any, held: Mapping[str, Tensor] | None, everything: list[Place]
) -> dict[str, Any]:
    """Return the fields of a configuration that uses earlier names of layers."""
    targets = config.target_modules
    if not targets or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return {}
    layers = [place for place in everything if kind_of(place.base) is not None]
    if held is not None and _are_present(held, {place.path for place in layers}):
        return {}
    match = matcher(targets)
    meant = [place.path for place in layers if any(map(match, (place.path, *place.aliases)))]
    if held is None and (meant or getattr(config, "target_parameters", None)):
        return {}
    layout = layout_of(model)
    if held is None:
        former = {place.path: layout.former(place.path)[-1] for place in layers}
    else:
        former = _former_paths(held, layout, {place.path for place in layers})
    new = {path: old for path, old in former.items() if old != path and match(old) is not None and _chosen(config, old)}
    if not new:
        return {}
    present, former_names = [place.path for place in layers], set(new.values())
    paths = [place.path for place in everything]
    kept = set() if isinstance(targets, str) else {pattern for pattern in targets if _means(pattern, present)}
    chosen = {*new, *meant} if isinstance(targets, str) else set(new)
    fields: dict[str, Any] = {"target_modules": kept | set(shortened(chosen, paths))}
    if getattr(config, "layers_pattern", None):
        fields |= {"layers_to_transform": None, "layers_pattern": None}  # chosen by it already
    for name in ("rank_pattern", "alpha_pattern"):
        fields |= _patterns_now(config, name, new, present)
    if getattr(config, "exclude_modules", None) and not isinstance(config.exclude_modules, str):
        fields["exclude_modules"] = {
            pattern
            for pattern in config.exclude_modules
            if _means(pattern, present) or not _means(pattern, former_names)
        }
    return fields


def _are_present(held: Mapping[str, Tensor], paths: set[str]) -> bool:
    """Whether every tensor belongs to a layer by the layer's own path, so that no earlier name can be meant."""
    for key in held:
        path = key.removeprefix("base_model.model.")
        while path and path not in paths:
            path = path.rpartition(".")[0]
        if not path:
            return False
    return True


def _chosen(config: Any, former: str) -> bool:
    """Whether ``exclude_modules`` and ``layers_to_transform`` leave a layer in, by its earlier name."""
    excluded = getattr(config, "exclude_modules", None)
    if excluded and matcher(excluded)(former) is not None:
        return False
    layers = getattr(config, "layers_to_transform", None)
    if layers is None:
        return True
    return layer_index(former, config.layers_pattern) in ({layers} if isinstance(layers, int) else set(layers))


def _patterns_now(config: Any, name: str, new: dict[str, str], present: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in (getattr(config, name, None) or {}).items():
        named = [path for path, former in new.items() if _keyed(key, [former])]
        found |= {re.escape(path): value for path in named}
        if not named or _keyed(key, present):
            found[key] = value
    return {name: found} if found else {}


def _former_paths(held: Mapping[str, Tensor], layout: Layout, paths: set[str]) -> dict[str, str]:
    """Return what the layers that an adapter's tensors belong to were called, by path."""
    found: dict[str, str] = {}
    for key in held:
        old = key.removeprefix("base_model.model.")
        path = now = layout.present(old)
        while "." in path and path not in paths:
            path = path.rpartition(".")[0]
        rest = now[len(path) :]
        if path in paths and old.endswith(rest):
            found[path] = old[: len(old) - len(rest)]
    return found
