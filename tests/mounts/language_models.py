"""Tiny language models whose head shares the weight of the embedding, or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TOKENS = torch.tensor([[1, 2, 3, 3], [4, 1, 0, 7]])


def llama(tied: bool = True, layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=10,
        num_hidden_layers=layers,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(tokens).logits
