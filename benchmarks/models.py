"""The models that rows are measured on: Llama with random weights, built from a config, nothing downloaded."""

from __future__ import annotations

from typing import Any


def llama(layers: int, hidden: int, inner: int, heads: int = 8, vocabulary: int = 128) -> Any:
    """``LlamaForCausalLM`` in fp32; seven linear layers a block, so ``7 * layers`` targets of ``all-linear``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocabulary,
    )
    return LlamaForCausalLM(config)


def give_values(model: Any, seed: int = 0) -> None:
    """Small random values for every trainable parameter, by name: LoRA's B is zero at first, and zero hides errors."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
