"""Embeddings with every option of torch's, and scaled ones of model libraries, beside PEFT and plain torch."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.policy import INLAY, PEFT, Policy
from inlay.errors import MergeError
from inlay.methods.lora import LoraConfig

TOKENS = torch.tensor([[1, 2, 2, 0], [2, 5, 1, 2]])
PREFIX = "base_model.model."

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 2},
    "max_norm": {"max_norm": 1.0},
    "max_norm_l1": {"max_norm": 2.0, "norm_type": 1.0},
    "by_frequency": {"scale_grad_by_freq": True},
    "sparse": {"sparse": True},
}


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6, **options)
        self.lin = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.table(x))


def pair(policy: Policy, **options: Any) -> tuple[Model, Any, Model]:
    torch.manual_seed(0)
    base = Model(**options)
    dense = copy.deepcopy(base)
    dense.table.sparse = False  # PEFT's backward fails on sparse tables
    theirs = peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=["table"]))
    ours = copy.deepcopy(base)
    inject(plan(ours, LoraConfig(r=2, target_modules=["table"]), policy=policy))
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
                mine[name.removeprefix(PREFIX)].copy_(parameter)
    return ours, theirs, base


@pytest.mark.parametrize("policy", [INLAY, PEFT], ids=["inlay", "peft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_same_outputs_and_gradients(name: str, policy: Policy) -> None:
    ours, theirs, base = pair(policy, **OPTIONS[name])
    y = ours(TOKENS)
    torch.testing.assert_close(y, theirs(TOKENS))
    assert not torch.allclose(y, base(TOKENS))
    for model in (ours, theirs):
        (model(TOKENS) ** 2).sum().backward()
    expected = {n.removeprefix(PREFIX): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name_, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert not parameter.grad.is_sparse  # any optimiser can take it
            torch.testing.assert_close(parameter.grad, expected[name_])


@pytest.mark.parametrize("name", [name for name in OPTIONS if "max_norm" not in name])
def test_merged(name: str) -> None:
    ours, theirs, base = pair(INLAY, **OPTIONS[name])
    y = ours(TOKENS)
    layer: Any = ours.table
    merge(layer.state)
    torch.testing.assert_close(ours(TOKENS), y)
    unmerge(layer.state)
    assert torch.equal(layer.weight, base.table.weight)
    merge(layer.state, keep="none")
    eject(ours, layer.state, restore=False)
    torch.testing.assert_close(ours.table.weight, theirs.merge_and_unload().table.weight)


def test_merging_above_max_norm_is_refused() -> None:
    """The next lookup would shrink the merged rows; PEFT merges and changes its output."""
    ours, theirs, _ = pair(INLAY, max_norm=1.0)
    y = theirs(TOKENS)
    merged = theirs.merge_and_unload()
    assert not torch.allclose(merged(TOKENS), y, atol=1e-2)
    layer: Any = ours.table
    before = ours(TOKENS)
    with pytest.raises(MergeError, match=r"'table'.*max_norm=1.0"):
        merge(layer.state)
    assert torch.equal(ours(TOKENS), before)


def gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1}
    return Gemma3ForCausalLM(
        Gemma3TextConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=4, tie_word_embeddings=False, **sizes)
    )


def bart() -> nn.Module:
    from transformers import BartConfig, BartModel

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 10))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    sizes |= {"vocab_size": 12, "d_model": 8, "max_position_embeddings": 16}
    return BartModel(BartConfig(scale_embedding=True, **sizes, **heads, **special))


def read(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("token_rows", [False, True], ids=["lora", "token_rows"])
@pytest.mark.parametrize("family", ["gemma3", "bart"])
def test_scaled_embeddings_of_real_models(family: str, token_rows: bool) -> None:
    build = {"gemma3": gemma3, "bart": bart}[family]
    options: dict[str, Any] = {"target_modules": ["encoder.embed_tokens" if family == "bart" else "embed_tokens"]}
    if token_rows:
        indices = {"encoder.embed_tokens": [1, 3]} if family == "bart" else [1, 3]
        options = {"target_modules": ["q_proj"], "trainable_token_indices": indices}
    torch.manual_seed(0)
    base = build().eval()
    ours = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **options)).eval()
        state = inject(plan(ours, LoraConfig(r=2, **options), policy=PEFT))
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
                mine[name.removeprefix(PREFIX)].copy_(parameter)
    y = read(ours(TOKENS))
    torch.testing.assert_close(y, read(theirs(TOKENS)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, read(base(TOKENS)), atol=1e-3)
    for model in (ours, theirs):
        (read(model(TOKENS)) ** 2).sum().backward()
    expected = {n.removeprefix(PREFIX): p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad and name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)
    if family == "gemma3":  # Bart's tables share one weight
        merge(state)
        torch.testing.assert_close(read(ours(TOKENS)), y, rtol=1e-4, atol=1e-4)
