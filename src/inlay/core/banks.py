"""Stacked parameters that earlier releases of a model's code held as layers of their own.

transformers 5 stacks the experts of a block in one parameter where transformers 4 had a list of linear layers, and made
the linear router a module of its own. Configurations and checkpoints from before name those layers. What became of
them is read from transformers' own table of conversions, which it has loaded where it made the model.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from inlay.core.kind import kind_of
from inlay.core.targets import base_parameters, places

__all__ = ["Bank", "Layout", "conversions", "has_stack", "layout_of", "stacking", "stem"]


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
    changes = conversions(model)
    layout = Layout([], [c for c in changes if not hasattr(c, "operations")])
    stacked = [found for c in changes if (found := stacking(c)) is not None]
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


def conversions(model: nn.Module) -> list[Any]:
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


def stem(key: str) -> tuple[str, str]:
    """Return the path of a layer and the rest of a key of LoRA: ``("model.gate", "lora_A.weight")``."""
    bare = key.removeprefix("base_model.model.")
    path, mark, rest = bare.partition(".lora_")
    return (path, f"lora_{rest}") if mark else (bare, "")


def has_stack(module: nn.Module) -> bool:
    """Whether a module holds a parameter that may be a stack of former layers' weights."""
    held = module._parameters
    return bool(held) and type(module) is not nn.Linear and any(p is not None and p.dim() == 3 for p in held.values())
