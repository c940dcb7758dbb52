"""The contract of a start: what fills A and B of a low-rank update, and what is taken out of the base for it.

A start sees matrices: a grouped convolution is one matrix for each group, a bank of experts one for each expert, so
that what it computes fits every layer kind. It names no layer class and no adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor

from inlay.core.affine import Affine, Site
from inlay.core.method import P
from inlay.core.slot import Init, KaimingUniform, Normal, zeros
from inlay.errors import ConfigError, did_you_mean

__all__ = [
    "Drawn",
    "Factors",
    "Given",
    "Leading",
    "Start",
    "begin",
    "blocks_of",
    "fill_factors",
    "start_names",
    "start_of",
]


@dataclass(frozen=True)
class Given:
    """What a start computes from.

    Attributes:
        weight: (*blocks, out, fan_in) the base weight, in float32 or wider.
        r: rank of the update of one block.
        scaling: what the update ``B @ A`` is multiplied with.
        config: the adapter's configuration.
        site: where; for reasons, and for how the weight is stored.
        measured: what a calibration pass left at the layer, by the names in ``Start.measured``.
    """

    weight: Tensor
    r: int
    scaling: float
    config: Any
    site: Site
    measured: Mapping[str, Any] = field(default_factory=dict)

    def scaled(self, left: Tensor, values: Tensor, right: Tensor) -> Factors:
        """Return factors with ``scaling * B @ A = left @ diag(values) @ right``, the values split evenly.

        Args:
            left: (*blocks, out, r).
            values: (*blocks, r), not negative.
            right: (*blocks, r, fan_in).
        """
        root = (values / abs(self.scaling)).sqrt()
        return Factors(root.unsqueeze(-1) * right, left * root.unsqueeze(-2) * math.copysign(1.0, self.scaling))


@dataclass(frozen=True)
class Factors:
    """What a start gives.

    Attributes:
        A: (*blocks, r, fan_in).
        B: (*blocks, out, r).
        weight: (*blocks, out, fan_in) the new base of a start that changes it; by default the base without the update.
    """

    A: Tensor
    B: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """Draws values and leaves zeros: PEFT makes an ordinary layer here, and a seed gives the values that follow."""

    init: Init

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        self.init(tensor, generator)
        tensor.zero_()


class Start:
    """Base class of the starts; this one is the ordinary one (Hu et al. 2021): A Kaiming-uniform, B zero.

    Class attributes:
        reads_base: ``factors`` is called with the base weight.
        changes_base: it takes the update out of the base, so that a fresh adapter changes nothing all the same.
        identity: whether a fresh adapter changes nothing.
        trains_up: whether B trains.
        measured: attributes of base layers where a calibration pass leaves what ``factors`` needs.
    """

    reads_base: ClassVar[bool] = False
    changes_base: ClassVar[bool] = False
    identity: ClassVar[bool] = True
    trains_up: ClassVar[bool] = True
    measured: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: Any = True) -> None:
        self.name = name

    def refuse(self, site: Site, r: int, scaling: float) -> str | None:
        """Return one sentence that says why mathematics forbids this start at the site, or None.

        Args:
            r: rank of one block.
        """
        return None

    def fills(self, site: Site, r: int) -> tuple[Init, Init]:
        """Return what A and B are filled with when they are made."""
        if self.reads_base:
            return zeros, zeros
        if site.lookup:
            # One-hot inputs read columns of A, so A takes the zeros: B then gets gradients of a useful size at once.
            return zeros, Normal(1.0)
        return KaimingUniform(), zeros

    def discarded(self, site: Site) -> tuple[Init | None, Init | None]:
        """Return what PEFT fills A and B with first, drawing values that it then replaces."""
        drawn = Normal(1.0) if site.lookup else KaimingUniform()
        return drawn, drawn

    def factors(self, given: Given) -> Factors | None:
        """Return the factors that follow from the base; None leaves what they were filled with, and the base."""
        return None


class Leading(Start):
    """A start whose factors are as many directions of the base as the rank; there must be as many."""

    reads_base = True
    changes_base = True
    directions: ClassVar[int] = 1  # for each rank

    def refuse(self, site: Site, r: int, scaling: float) -> str | None:
        if scaling == 0:
            return f"init_lora_weights={self.name!r} divides by the scale, and lora_alpha is 0"
        out, wanted = site.out // site.groups, self.directions * r
        if wanted > min(out, site.fan_in):
            return (
                f"init_lora_weights={self.name!r} takes {wanted} directions of a weight of {out} x {site.fan_in}, "
                f"which has {min(out, site.fan_in)}; lower r there with rank_pattern"
            )
        return None


# init_lora_weights -> where its class is
_STARTS = {
    "gaussian": ("ordinary", "Gaussian"),
    "eva": ("eva", "Eva"),
    "olora": ("olora", "OLoRA"),
    "pissa": ("pissa", "PiSSA"),
    "corda": ("corda", "CorDA"),
    "loftq": ("loftq", "LoftQ"),
    "orthogonal": ("orthogonal", "Orthogonal"),
    "lora_ga": ("lora_ga", "LoraGA"),
    "mica": ("mica", "MiCA"),
}
_ROUNDS = re.compile(r"pissa_niter_(\d+)")


def start_names() -> list[str]:
    """Return the words that ``init_lora_weights`` may be."""
    return sorted([*_STARTS, "pissa_niter_[number]"])


@cache
def _made(name: bool | str) -> Start:
    if name is True:
        return Start(name)
    if name is False:
        from inlay.inits.ordinary import Random

        return Random(name)
    key = "pissa" if _ROUNDS.fullmatch(name) else name
    module, cls = _STARTS[key]
    made: Start = getattr(import_module(f"inlay.inits.{module}"), cls)(name)
    return made


def start_of(name: bool | str, owner: str = "LoraConfig") -> Start:
    """Return the start that ``init_lora_weights`` names.

    Raises:
        ConfigError: there is none of that name.
    """
    if isinstance(name, bool):
        return _made(name)
    word = name.lower() if isinstance(name, str) else name
    if word not in _STARTS and not (isinstance(word, str) and _ROUNDS.fullmatch(word)):
        raise ConfigError(
            f"{owner}.init_lora_weights: expected True, False or one of {', '.join(map(repr, start_names()))}, found "
            f"{name!r}.{did_you_mean(str(name), start_names())}"
        )
    return _made(word)


def begin(start: Start, config: Any, site: Site, p: P, layer: Affine) -> Affine | None:
    """Give an adapter's factors the values that follow from the base.

    Args:
        p: ``A`` and ``B`` are written, in their own dtypes.
        layer: the base, in float32 or wider.

    Returns:
        The base that is to replace it, of a start that changes it.
    """
    weight = blocks_of(site, layer.weight)
    n = math.prod(site.experts)
    r = p.A.shape[0] // n // site.groups
    found = start.factors(Given(weight, r, float(p.scaling), config, site, p.measured))
    if found is None:
        return None
    A, B = found.A.to(p.A.dtype), found.B.to(p.B.dtype)
    fill_factors(site, p, found)
    if not start.changes_base:
        return None
    rest = found.weight
    if rest is None:
        rest = weight - float(p.scaling) * (B.to(weight.dtype) @ A.to(weight.dtype))
    return Affine(rest.reshape(layer.weight.shape), layer.bias)


def fill_factors(site: Site, p: P, factors: Factors) -> None:
    """Write factors into an adapter's tensors, in their own dtypes."""
    p.A.copy_(_packed_down(site, factors.A).view(p.A.shape))
    p.B.copy_(_packed_up(site, factors.B).view(p.B.shape))


def blocks_of(site: Site, weight: Tensor) -> Tensor:
    """Return the weight as (groups, out, fan_in) where a layer has groups, and as it is otherwise."""
    return weight.unflatten(0, (site.groups, -1)) if site.groups > 1 else weight


def _packed_down(site: Site, A: Tensor) -> Tensor:
    """Return A with all blocks on the rank axis; a group reads its own channels, though A has columns for all."""
    if site.groups == 1:
        return A.reshape(-1, site.fan_in)
    g, r = A.shape[:2]
    whole = A.new_zeros(g, r, g, site.fan_in)
    for i in range(g):
        whole[i, :, i] = A[i]
    return whole.view(g * r, g * site.fan_in)


def _packed_up(site: Site, B: Tensor) -> Tensor:
    """Return B as (out, rank); experts are fastest on its rank axis, and each group of rows has its own columns."""
    if site.experts:
        return B.reshape(-1, *B.shape[-2:]).permute(1, 2, 0).reshape(site.out, -1)
    return B.reshape(site.out, B.shape[-1])
