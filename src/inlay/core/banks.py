"""Stacked parameters that earlier releases of a model's code held as layers of their own, and what configs call them.

transformers 5 stacks the experts of a block in one parameter where transformers 4 had a list of linear layers, and made
the linear router a module of its own. Configurations and checkpoints from before name those layers. What became of
them is read from transformers' own table of conversions, which it has loaded where it made the model.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from inlay.core.kind import kind_of
from inlay.core.patterns import layer_index, matcher, pattern_key
from inlay.core.targets import ALL_LINEAR, Place, base_parameters, places, shortened
from inlay.errors import TargetError

__all__ = ["Bank", "Layout", "layout_of", "retargeted", "stacking", "stem"]


@dataclass(frozen=True)
class Bank:
    """One parameter, and the linear layers that it was.

    Attributes:
        owner: path of the module that has it.
        parameter: its name there.
        experts: how many matrices are stacked; 0 for one matrix, which was a layer at ``owner``.
        parts: what the layers of one expert were called; their outputs follow one another in each matrix.
    """

    owner: str
    parameter: str
    experts: int = 0
    parts: tuple[str, ...] = ("",)

    @property
    def path(self) -> str:
        return f"{self.owner}.{self.parameter}"

    def layers(self) -> list[tuple[int, int, str]]:
        """Return (expert, number of the part, path) of each former layer, its block being called as it is now."""
        if not self.experts:
            return [(0, 0, self.owner)]
        return [(e, p, f"{self.owner}.{e}.{part}") for e in range(self.experts) for p, part in enumerate(self.parts)]


@dataclass
class Layout:
    """What changed in a model's code: banks, and new names.

    Attributes:
        banks: parameters that were layers, in the order of the model.
    """

    banks: list[Bank] = field(default_factory=list)
    _renamings: list[Any] = field(default_factory=list)
    _back: list[Any] | None = None

    @property
    def present_differs(self) -> bool:
        """Whether anything changed."""
        return bool(self.banks or self._renamings)

    def present(self, path: str) -> str:
        """Return what a path of earlier code is called now."""
        for renaming in self._renamings:
            path = renaming.rename_source_key(path)[0]
        return path

    def former(self, path: str) -> tuple[str, ...]:
        """Return what a path of now may have been called: as now, or as before all renamings."""
        if self._back is None:
            self._back = [renaming.reverse_transform() for renaming in reversed(self._renamings)]
        old = path
        for renaming in self._back:
            old = renaming.rename_source_key(old)[0]
        return (path,) if old == path else (path, old)


def layout_of(model: nn.Module) -> Layout:
    """Return what changed in a model's code since earlier releases of transformers; nothing for any other model."""
    conversions = _conversions(model)
    layout = Layout([], [c for c in conversions if not hasattr(c, "operations")])
    stacked = [found for c in conversions if (found := stacking(c)) is not None]
    parameters = base_parameters(model)
    blocks = set()
    for name, parameter in parameters.items() if stacked else ():
        if parameter.dim() != 3:
            continue
        parts = next((parts for suffix, parts in stacked if f".{name}".endswith(f".{suffix}")), None)
        if parts is not None:
            owner, _, leaf = name.rpartition(".")
            layout.banks.append(Bank(owner, leaf, parameter.shape[0], parts))
            blocks.add(owner.rpartition(".")[0])
    for place in places(model) if blocks else ():
        weight = place.base._parameters.get("weight")
        router = place.path.rpartition(".")[0] in blocks and weight is not None and weight.dim() == 2
        if router and kind_of(place.base) is None:
            layout.banks.append(Bank(place.path, "weight"))
    return layout


def _conversions(model: nn.Module) -> list[Any]:
    """Return transformers' conversions for a model of its own; older releases have none."""
    modeling, table = (sys.modules.get(f"transformers.{name}") for name in ("modeling_utils", "conversion_mapping"))
    own = getattr(modeling, "PreTrainedModel", None)
    get = getattr(table, "get_model_conversion_mapping", None)
    return list(get(model)) if get is not None and own is not None and isinstance(model, own) else []


def stacking(conversion: Any) -> tuple[str, tuple[str, ...]] | None:
    """Return what a conversion stacks: the parameter's dotted ending and the names of the layers in an expert."""
    steps = [type(step).__name__ for step in getattr(conversion, "operations", ())]
    if steps not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) or len(conversion.target_patterns) != 1:
        return None
    target = conversion.target_patterns[0].replace("\\", "").lstrip(".")
    parts = []
    for source in conversion.source_patterns:
        above, star, below = source.replace("\\", "").lstrip(".").rpartition(".*.")
        if not star or above != target.rpartition(".")[0] or not below.endswith(".weight"):
            return None
        parts.append(below.removesuffix(".weight"))
    return target, tuple(parts)


# -- configurations ---------------------------------------------------------------------------------------------------


def retargeted(
    model: nn.Module, config: Any, held: Mapping[str, Tensor] | None = None, prefixes: bool = False
) -> dict[str, Any]:
    """Return the fields of a configuration that names former layers, rewritten for the parameters they are now.

    Args:
        model: the model.
        config: any configuration; only those with ``target_parameters`` can be rewritten.
        held: the tensors of an adapter that is going to be loaded. They say which former layers it has, in place of
            ``target_modules``, which by itself cannot tell experts from dense layers of the same name.
        prefixes: see :func:`inlay.core.patterns.pattern_key`.

    Raises:
        TargetError: a parameter can be adapted as a whole only, and the configuration wants a part of it, or other
            ranks or scales for some of its parts.
    """
    if getattr(config, "target_modules", None) is None or not hasattr(config, "target_parameters"):
        return {}
    if not any(parameter.dim() == 3 for parameter in base_parameters(model).values()):
        return {}
    layout = layout_of(model)
    names = {bank: [(e, p, layout.former(path)) for e, p, path in bank.layers()] for bank in layout.banks}
    given = matcher(config.target_parameters or [])
    wanted = _wanted(config, [bank for bank in names if given(bank.path) is None], names, held, prefixes)
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
    held: Mapping[str, Tensor] | None,
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
    ranks = None if held is None else _ranks(held)
    wanted = {}
    for bank in banks:
        asked: dict[tuple[int, int], tuple[int, float]] = {}
        for expert, part, former in names[bank]:
            rank = _by_pattern(config.rank_pattern, former, config.r, prefixes)
            if ranks is not None:
                rank = next((ranks[path] for path in former if path in ranks), 0)
                if not rank:
                    continue
            elif (
                any(exclude(path) is not None for path in former)
                or all(match(path) is None for path in former)
                or (indices is not None and layer_index(former[0], config.layers_pattern) not in indices)
            ):
                continue
            asked[expert, part] = (rank, _by_pattern(config.alpha_pattern, former, config.lora_alpha, prefixes))
        if asked:
            wanted[bank] = _whole(config, bank, asked, held is None)
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


def _ranks(held: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the rank of every layer that has an ``A`` among an adapter's tensors, by path."""
    return {
        path: tensor.shape[0]
        for key, tensor in held.items()
        for path, role in [stem(key)]
        if role.startswith("lora_A.")
    }


def stem(key: str) -> tuple[str, str]:
    """Return the path of a layer and the rest of a key of LoRA: ``("model.gate", "lora_A.weight")``."""
    bare = key.removeprefix("base_model.model.")
    path, mark, rest = bare.partition(".lora_")
    return (path, f"lora_{rest}") if mark else (bare, "")


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
