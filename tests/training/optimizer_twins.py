"""The same small language model with the same adapter, once by PEFT and once by Inlay, and how both are trained."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from torch import nn

import inlay


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=32, tie_word_embeddings=False)
    ).eval()


def twins(fields: dict[str, Any] | None = None, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Inlay's model and peft's, with equal weights; B is not zero, so that A gets gradients.

    In double precision, because Adam divides by gradients and so enlarges how sums were rounded.
    """
    usual = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]} | (fields or {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = peft.get_peft_model(llama(), peft.LoraConfig(**usual)).to(dtype)
        mine = inlay.get_peft_model(llama(), inlay.LoraConfig(**usual)).to(dtype)
    values = named(real)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in values.values():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, parameter in named(mine).items():
            parameter.copy_(values[name])
    return mine, real


def named(model: Any) -> dict[str, nn.Parameter]:
    """Parameters by name, a base layer below token rows named as in Inlay."""
    return {name.replace(".token_adapter.base_layer.", ".base_layer."): p for name, p in model.named_parameters()}


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(steps):
        tokens = torch.randint(32, (2, 6), generator=generator)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same_weights(mine: Any, real: Any) -> None:
    found, expected = named(mine), named(real)
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=0.0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
        assert found[name].requires_grad == parameter.requires_grad, name


def same_groups(mine: Any, real: Any, model: Any, other: Any) -> None:
    """Groups hold the same parameters, in the same order, with the same numbers."""
    names = [{id(p): name for name, p in named(held).items()} for held in (model, other)]
    assert len(mine.param_groups) == len(real.param_groups)
    for found, expected in zip(mine.param_groups, real.param_groups, strict=True):
        listed = [[names[i][id(p)] for p in group["params"]] for i, group in enumerate((found, expected))]
        assert listed[0] == listed[1]
        assert {key: found[key] for key in expected if key != "params"} == {
            key: value for key, value in expected.items() if key != "params"
        }
