"""Small transformers with random weights, the same for the same seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY = 64


def gpt2(cls: str = "GPT2LMHeadModel", seed: int = 0, **changes: Any) -> Any:
    """A GPT-2 of two blocks, in eval mode."""
    import transformers

    values: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(seed)
    return getattr(transformers, cls)(transformers.GPT2Config(**(values | changes))).eval()


def bert(cls: str = "BertModel", seed: int = 0, **changes: Any) -> Any:
    """A BERT of two blocks, in eval mode."""
    import transformers

    values: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values |= {"intermediate_size": 64, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
    torch.manual_seed(seed)
    return getattr(transformers, cls)(transformers.BertConfig(**(values | changes))).eval()


def t5(seed: int = 0) -> Any:
    """A T5 of two blocks a side, in eval mode."""
    import transformers

    values: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    values |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(seed)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**values)).eval()


def tokens(batch: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    """Random token ids without special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def perturb(model: torch.nn.Module, adapter: str, scale: float = 0.1, seed: int = 2) -> None:
    """Give an adapter random values, so that it changes the output."""
    from inlay.core.active import adapter_parameters
    from inlay.core.state import find_state

    state = find_state(model)
    assert state is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(state, [adapter]):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
