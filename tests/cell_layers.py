"""The layers that the cells adapt, where torch has none of the kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """An embedding that multiplies its output, as Gemma's does."""

    def __init__(self, *args: Any, scale: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


class OwnRMSNorm(nn.Module):
    """An RMS norm as model libraries write it; known by its name only."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.to(torch.float64 if hidden_states.dtype == torch.float64 else torch.float32)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(hidden_states.dtype)


class Experts(nn.Module):
    """A bank of experts with a fixed soft routing; GPT-OSS stores such banks transposed."""

    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, 12, 8) if is_transposed else torch.randn(3, 8, 12))
        self.down = nn.Parameter(torch.randn(3, 8, 12) if is_transposed else torch.randn(3, 12, 8))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        share = x[..., :3].sigmoid()
        hidden = torch.tanh(torch.einsum("...i,eij->...ej", x, up))
        return torch.einsum("...ej,ejo,...e->...o", hidden, down, share)


class Tied(nn.Module):
    """A bare matrix that is used twice, in ways of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(8, 12) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix.T) @ self.matrix


def hf_conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(8, 12)


def bags(mode: str, **options: Any) -> Callable[[], nn.Module]:
    """An embedding bag of small numbers: torch draws them so large that few of the updates would show."""

    def build() -> nn.Module:
        table = torch.randn(12, 12) * 0.2
        return nn.EmbeddingBag(12, 12, mode=mode, _weight=table, **options)

    return build
