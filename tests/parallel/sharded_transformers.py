"""Tensor parallelism as transformers does it (``tp_plan="auto"``), which replaces ``forward`` instead of hooking it."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_checks import assert_bitwise, assert_close, assert_gradients, checkpoint, common_folder, trained
from sharded_model import SEED, perturb
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from inlay.checkpoint.state_dict import set_peft_model_state_dict
from inlay.core.call import opened
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.errors import UnsupportedError
from inlay.methods.ia3 import IA3Config
from inlay.methods.ln_tuning import LNTuningConfig
from inlay.methods.lora import LoraConfig
from inlay.methods.oft import OFTConfig
from inlay.methods.vera import VeraConfig

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LINEAR: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, **LINEAR),
    "dora": lambda: LoraConfig(r=4, use_dora=True, **LINEAR),
    "embedding": lambda: LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: OFTConfig(r=0, oft_block_size=8, **LINEAR),
    "vera": lambda: VeraConfig(r=4, init_weights=False, target_modules=["q_proj", "o_proj"]),
    "tokens": lambda: LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 31]),
    "ln_tuning": lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "copy": lambda: LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj", "lm_head"]),
}
TOKENS = (torch.arange(18) * 7 % 40).view(3, 6)


@lru_cache
def config() -> Any:
    return LlamaConfig(**SIZES)


def pair(settings: Any = None) -> tuple[Any, Any]:
    """The same random model, whole and spread over the processes."""
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(settings or config())
    with common_folder() as folder:
        if dist.get_rank() == 0:
            whole.save_pretrained(folder)
        dist.barrier()
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    return whole, model


def outcome(model: Any) -> Tensor:
    result = model(input_ids=TOKENS, labels=TOKENS)
    result.loss.backward()
    return result.logits.detach()


def equals(method: str, settings: Any = None) -> None:
    """Forward with and without gradients, gradients, saving, loading, merging, ejecting."""
    whole, model = pair(settings)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.weight, DTensor)
    untouched = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    with torch.no_grad():
        base = whole(TOKENS).logits
    states = [inject(plan(net, METHODS[method](), "one"), seed=SEED) for net in (whole, model)]
    assert_bitwise(checkpoint(model), checkpoint(whole))
    perturb(states[0])
    for name, parameter in trained(whole).items():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    set_peft_model_state_dict(model, checkpoint(whole), adapter_name="one")
    expected = outcome(whole)
    assert_close(outcome(model), expected, "output")
    assert_gradients(model, {name: p.grad for name, p in trained(whole).items()})
    with torch.no_grad():
        assert_close(model(TOKENS).logits, expected, "output without gradients")
        with opened(states[1], disabled=True):
            assert_close(model(TOKENS).logits, base, "output without adapters")
    assert_bitwise(checkpoint(model), checkpoint(whole))
    merge(states[1])
    with torch.no_grad():
        assert_close(model(TOKENS).logits, expected, "merged output")
    unmerge(states[1])
    eject(model, states[1])
    assert {name: module.__dict__.get("forward") for name, module in model.named_modules()} == untouched
    with torch.no_grad():
        assert_close(model(TOKENS).logits, base, "output after ejecting")


def hidden_reduction() -> None:
    """A norm whose gradient transformers sums in a hook of its own is refused."""
    _, model = pair(Qwen3Config(**SIZES, head_dim=8))
    norm = model.model.layers[0].self_attn.q_norm
    assert isinstance(norm, nn.Module)
    assert "forward" in norm.__dict__
    with pytest.raises(UnsupportedError, match="ReplicatedWithGradAllReduce"):
        plan(model, LNTuningConfig(target_modules=["q_norm"]), "one")


CASES: dict[str, Callable[[], None]] = {
    **{method: partial(equals, method) for method in METHODS},
    "tied_tokens": partial(equals, "tokens", LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "hidden_reduction": hidden_reduction,
}
