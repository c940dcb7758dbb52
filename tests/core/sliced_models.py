"""A model with two fused layers, and the one with their slices in layers of their own at the same paths."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from cells import METHODS
from torch import Tensor, nn

SLICES = {"first": [*range(2, 6), *range(9, 13)], "last": [*range(3), *range(15, 20)]}
PARTS = {"first[2:6,9:13]", "last[:3,15:20]"}


def layer(out: int, transposed: bool) -> nn.Module:
    return transformers.pytorch_utils.Conv1D(out, 12) if transposed else nn.Linear(12, out)


class Whole(nn.Module):
    """A fused layer of 20 rows."""

    def __init__(self, name: str, transposed: bool) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, layer(20, transposed))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


class Apart(Whole):
    """The same layer, with the rows of the slice in a layer of their own, which stands at the same path."""

    def __init__(self, whole: Whole, transposed: bool) -> None:
        super().__init__(whole.name, transposed)
        fused, rows = whole.get_submodule(whole.name), SLICES[whole.name]
        self.rest = [copy.deepcopy(fused)]  # no module of the model
        own = layer(len(rows), transposed).double()
        with torch.no_grad():
            own.weight.copy_(fused.weight[:, rows] if transposed else fused.weight[rows])
            own.bias.copy_(fused.bias[rows])
        self.add_module(self.name, own)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest[0].to(x.dtype)(x).detach().index_copy(-1, torch.tensor(SLICES[self.name]), super().forward(x))


class Pair(nn.Module):
    def __init__(self, first: Whole, last: Whole) -> None:
        super().__init__()
        self.a, self.b = first, last

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), self.b(x)], -1)


def models(transposed: bool) -> tuple[Pair, Pair]:
    """A model with two fused layers, and the one with their slices in layers of their own."""
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        wholes = [Whole(name, transposed).double() for name in SLICES]
        for whole in wholes:
            for parameter in whole.parameters():
                nn.init.normal_(parameter, std=0.5)
    return Pair(*wholes), Pair(*(Apart(whole, transposed) for whole in wholes))


def configs(method: str) -> tuple[Any, Any]:
    apart = METHODS[method]({"target_modules": ["first", "last"]})
    sliced = copy.deepcopy(apart)
    sliced.target_modules = set(PARTS)
    if getattr(sliced, "feedforward_modules", None):
        sliced.feedforward_modules = ".*(first|last)"
    return sliced, apart


def disturb(model: nn.Module) -> None:
    """Give what trains other values, the same by name."""
    with torch.no_grad():
        for name, parameter in sorted(adapters(model)):
            if parameter.requires_grad:
                noise = torch.Generator().manual_seed(sum(map(ord, name)))
                parameter.add_(torch.randn(parameter.shape, generator=noise).to(parameter), alpha=0.3)


def adapters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if "default" in name)
