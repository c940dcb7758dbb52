"""Layers to try a method on, and a model around a pair of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BATCH", "LAYERS", "LayerCase", "Pair"]

BATCH = 4


@dataclass(frozen=True)
class LayerCase:
    """A layer to adapt, and a batch for it.

    Attributes:
        build: makes the layer.
        shape: of one batch; its ``axis`` holds the samples, ``BATCH`` of them.
        vocabulary: inputs are indices below this number, not features.
        axis: where the samples are.
        arity: how many times the input is passed (attention takes query, key and value).
        padding: the index that torch gives no gradient.
        parameters: adapt these bare parameters of the layer, not the layer.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0
    axis: int = 0
    arity: int = 1
    padding: int | None = None
    parameters: tuple[str, ...] = ()

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> Pair:
        """Return the base model with fixed random weights, biases and norms too."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Pair(self.build, self.arity)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
        return model.to(dtype)

    def batch(self, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
        """Return inputs for ``BATCH`` samples."""
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return torch.randint(self.vocabulary, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator).to(dtype)

    def target(self, layers: Iterable[str]) -> dict[str, Any]:
        """Return the config fields that choose these layers of the model."""
        if self.parameters:
            return {
                "target_modules": [],
                "target_parameters": [f"{one}.{p}" for one in layers for p in self.parameters],
            }
        return {"target_modules": list(layers)}


class Pair(nn.Module):
    """Two layers of one kind side by side, and one that stays as it is."""

    def __init__(self, build: Callable[[], nn.Module], arity: int = 1) -> None:
        super().__init__()
        self.first = build()
        self.last = build()
        self.beside = nn.Linear(2, 2)
        self.arity = arity

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the (first) output of one layer."""
        y: Any = layer(*[x] * self.arity)
        return y[0] if isinstance(y, tuple) else y

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.first, x) + torch.tanh(self.call(self.last, x))


LAYERS: dict[str, LayerCase] = {
    "Linear": LayerCase(lambda: nn.Linear(12, 8), (BATCH, 3, 12)),
    "Linear without bias": LayerCase(lambda: nn.Linear(12, 8, bias=False), (BATCH, 3, 12)),
    "Conv1d": LayerCase(lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), (BATCH, 4, 9)),
    "Conv2d": LayerCase(lambda: nn.Conv2d(4, 8, (3, 2), padding=(1, 0), bias=False), (BATCH, 4, 7, 6)),
    "Conv2d in groups": LayerCase(lambda: nn.Conv2d(4, 8, 3, groups=2), (BATCH, 4, 7, 6)),
    "Conv3d": LayerCase(lambda: nn.Conv3d(3, 8, 2, padding=1), (BATCH, 3, 3, 4, 2)),
    "Embedding": LayerCase(lambda: nn.Embedding(11, 12), (BATCH, 5), vocabulary=11),
    "LayerNorm": LayerCase(lambda: nn.LayerNorm(12), (BATCH, 3, 12)),
    "MultiheadAttention": LayerCase(lambda: nn.MultiheadAttention(12, 2, batch_first=True), (BATCH, 5, 12), arity=3),
}
