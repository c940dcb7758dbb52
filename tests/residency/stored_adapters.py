"""A small model, and adapters of different rank, scale and layers for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.core.policy import INLAY
from inlay.models.wrapper import Wrapper

WIDTH = 6
TARGETS = ["a", "b"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, 8)
        self.b = nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def inputs(rows: int = 3) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1))


def saved(folder: Path, seed: int, **fields: Any) -> Tensor:
    """Save an adapter with random values and return the outputs that an ordinary load of it gives."""
    torch.manual_seed(seed)
    config = {"target_modules": TARGETS, "init_lora_weights": False, **fields}
    inlay.get_peft_model(net(), inlay.LoraConfig(**config)).save_pretrained(folder)
    with torch.no_grad():
        return inlay.PeftModel.from_pretrained(net(), folder)(inputs())


def store_of(model: nn.Module, r: int = 8, max_resident: int = 2, **options: Any) -> inlay.AdapterStore:
    config = inlay.LoraConfig(r=r, target_modules=TARGETS, **options.pop("fields", {}))
    return inlay.AdapterStore(model, config, max_resident=max_resident, **options)


def wrapped(model: nn.Module) -> Any:
    """A ``PeftModel`` without adapters."""
    assert issubclass(inlay.PeftModel, Wrapper)
    return inlay.PeftModel.around(model, INLAY)
