"""Tiny base models whose weights follow from their names alone: the same under every torch and transformers."""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["BASES", "base", "inputs", "logits", "shake"]


class Experts(nn.Module):
    """Stacked weights as parameters, without a linear layer: what ``target_parameters`` is for."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(2, 6, 8))
        self.down = nn.Parameter(torch.empty(2, 8, 6))
        self.square = nn.Parameter(torch.empty(2, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bti,eoi->bto", x, self.square)
        return torch.einsum("btf,eof->bto", torch.tanh(torch.einsum("bti,eoi->bto", x, self.up)), self.down)


class Net(nn.Module):
    """One of every layer that adapters go on."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 12, bias=False)
        self.back = nn.Linear(12, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.lin(self.emb(x)))
        x = self.norm(x + self.back(self.wide(x)))
        x = x + self.experts(x) + self.attention(x, x, x, need_weights=False)[0]
        x = torch.tanh(self.conv(x.unsqueeze(1)))[:, :, -1]
        return self.head(x.flatten(1))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes: dict[str, Any] = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=8, num_labels=3)
    return BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2)
    return GPT2LMHeadModel(config)


def _llama(tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))


BASES = {"net": Net, "bert": _bert, "gpt2": _gpt2, "llama": _llama, "tied": partial(_llama, tied=True)}


def base(name: str) -> nn.Module:
    """Return the base model of a name: float32, in eval mode, the same values whoever builds it."""
    model = BASES[name]().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_values(key, parameter.shape) + (1.0 if "orm" in key and key.endswith("weight") else 0.0))
    return model


def inputs() -> Tensor:
    """Return token ids (2, 5); every base takes them."""
    return torch.tensor([[1, 4, 2, 0, 3], [4, 9, 1, 7, 5]])


def logits(model: nn.Module) -> Tensor:
    """Return what a base, with or without adapters, answers to :func:`inputs`."""
    with torch.no_grad():
        answer = model(inputs())
    return answer if isinstance(answer, Tensor) else answer.logits


def shake(model: nn.Module) -> None:
    """Move everything that trains off its initial value, by its name and nothing else."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(_values(key, parameter.shape) * 1.4)


def _values(key: str, shape: torch.Size) -> Tensor:
    """Return numbers in [-0.5, 0.5] that depend on a name; the sine is taken in double precision."""
    count = torch.arange(shape.numel(), dtype=torch.float64)
    return (0.5 * torch.sin(count * 12.9898 + zlib.crc32(key.encode()) % 1000)).to(torch.float32).view(shape)
