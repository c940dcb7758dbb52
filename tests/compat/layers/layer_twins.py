"""One model with adapters twice: by peft and by Inlay's namespace of it, with equal weights."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import nn

import inlay.compat  # noqa: F401  makes the namespace importable

OURS, PEFT = "inlay.compat.peft", "peft"


def get(library: str, name: str) -> Any:
    """Return ``tuners.lora.Linear`` of one of the two libraries."""
    module, _, leaf = name.rpartition(".")
    return getattr(import_module(f"{library}.{module}".rstrip(".")), leaf)


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 4)
        self.emb = nn.Embedding(10, 6)
        self.conv = nn.Conv2d(4, 4, 3)
        self.conv1 = nn.Conv1d(4, 6, 3)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.ln = nn.LayerNorm(6)
        self.head = nn.Linear(4, 2)
        self.exp = Bank()


class Bank(nn.Module):
    """Stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->beo", x, self.w)


INPUTS = {
    "lin": lambda: (torch.randn(3, 6),),
    "emb": lambda: (torch.tensor([[1, 2, 3], [4, 1, 0]]),),
    "conv": lambda: (torch.randn(2, 4, 5, 5),),
    "conv1": lambda: (torch.randn(2, 4, 5),),
    "mha": lambda: (torch.randn(2, 3, 8),) * 3,
    "ln": lambda: (torch.randn(3, 6),),
    "head": lambda: (torch.randn(3, 4),),
    "exp": lambda: (torch.randn(3, 4),),
}
# name -> (config class, its fields, layers to look at)
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "lora": ("LoraConfig", {"target_modules": ["lin", "emb", "conv", "conv1", "mha"]}, ["lin", "emb", "conv", "mha"]),
    "lora_options": (
        "LoraConfig",
        {"target_modules": ["lin", "conv"], "use_rslora": True, "lora_bias": True, "lora_dropout": 0.1},
        ["lin", "conv"],
    ),
    "dora": ("LoraConfig", {"target_modules": ["lin", "emb", "conv"], "use_dora": True}, ["lin", "emb", "conv"]),
    "parameter": ("LoraConfig", {"target_modules": [], "target_parameters": ["exp.w"]}, ["exp"]),
    "copies": ("LoraConfig", {"target_modules": ["lin"], "modules_to_save": ["head"]}, ["head"]),
    "tokens_beside": ("LoraConfig", {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 2]}}, ["emb"]),
    "ia3": ("IA3Config", {"target_modules": ["lin", "conv"], "feedforward_modules": ["lin"]}, ["lin", "conv"]),
    "loha": ("LoHaConfig", {"r": 2, "target_modules": ["lin", "conv"]}, ["lin", "conv"]),
    "oft": ("OFTConfig", {"oft_block_size": 2, "target_modules": ["lin", "emb"]}, ["lin", "emb"]),
    "vera": ("VeraConfig", {"r": 2, "target_modules": ["lin"]}, ["lin"]),
    "fourierft": ("FourierFTConfig", {"n_frequency": 3, "target_modules": ["lin"]}, ["lin"]),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["ln"]}, ["ln"]),
    "tokens": ("TrainableTokensConfig", {"token_indices": [1, 3], "target_modules": ["emb"]}, ["emb"]),
}
LAYERS = [(case, layer) for case, (_, _, layers) in CASES.items() for layer in layers]


def equalise(theirs: nn.Module, ours: nn.Module) -> None:
    """Give both modules the same random adapter weights; names are the same in both."""
    mine = dict(ours.named_parameters())
    torch.manual_seed(1)
    with torch.no_grad():
        for full, parameter in theirs.named_parameters():
            name = full.replace("token_adapter.base_layer", "base_layer")  # in Inlay the layer holds the rows itself
            if any(part in name for part in ("base_layer", "original_module")):
                mine[name].copy_(parameter)
                continue
            parameter.add_(torch.randn_like(parameter) * 0.3)
            mine[name].copy_(parameter)


def twins(case: str, *, second: bool = False) -> tuple[Any, Any]:
    """Return the bare model with adapters, by peft and by Inlay."""
    name, fields, _ = CASES[case]
    made = []
    for library in (PEFT, OURS):
        torch.manual_seed(0)
        wrapped = get(library, "get_peft_model")(Net(), get(library, name)(**fields))
        if second:
            wrapped.add_adapter("other", get(library, name)(**fields))
        made.append(wrapped)
    equalise(*made)
    return made[0].base_model.model, made[1].base_model.model
