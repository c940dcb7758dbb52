"""Slices of fused projections, beside the same adapter on a layer of those rows, and beside models that read them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.core.call import opened
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.state import BASE
from inlay.errors import InlayError, TargetError, UnsupportedError
from inlay.methods.c3a import C3AConfig
from inlay.methods.fourierft import FourierFTConfig
from inlay.methods.gralora import GraloraConfig
from inlay.methods.loha import LoHaConfig
from inlay.methods.lora import LoraConfig

TARGETS = ["qkv_proj[4:8,10:14]"]
ROWS = [*range(4, 8), *range(10, 14)]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS),
    "lora_bias": LoraConfig(r=2, lora_bias=True, target_modules=TARGETS),
    "lora_random": LoraConfig(r=2, init_lora_weights="orthogonal", target_modules=TARGETS),
    "loha": LoHaConfig(r=2, alpha=3, target_modules=TARGETS),
    "c3a": C3AConfig(block_size=4, target_modules=TARGETS),
    "gralora": GraloraConfig(r=4, hybrid_r=2, target_modules=TARGETS),
    "fourierft": FourierFTConfig(n_frequency=6, target_modules=TARGETS),
}


class Block(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.qkv_proj = transformers.pytorch_utils.Conv1D(16, 8) if transposed else nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv_proj(x)


def _random(model: nn.Module, name: str = "default") -> None:
    for i, (path, parameter) in enumerate(model.named_parameters()):
        if f".{name}" in path:
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(i))


def _adapted(config: Any, transposed: bool = False) -> tuple[Block, Any]:
    torch.manual_seed(0)
    model = Block(transposed).double()
    state = inject(plan(model, config), seed=1)
    _random(model)
    return model, state


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("method", CONFIGS)
def test_it_is_the_adapter_of_a_layer_that_has_just_those_rows(method: str, transposed: bool) -> None:
    config = CONFIGS[method]
    model, state = _adapted(config, transposed)
    torch.manual_seed(0)
    plain = Block(transposed).double()
    weight = plain.qkv_proj.weight.mT if transposed else plain.qkv_proj.weight
    small = nn.ModuleDict({"qkv_proj": nn.Linear(8, len(ROWS)).double()})
    with torch.no_grad():
        small["qkv_proj"].weight.copy_(weight[ROWS])
        small["qkv_proj"].bias.copy_(plain.qkv_proj.bias[ROWS])
    whole = copy.deepcopy(config)
    whole.target_modules = ["qkv_proj"]
    inject(plan(small, whole), seed=1)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    twin = {n: p for n, p in small.named_parameters() if p.requires_grad}
    assert {n: p.shape for n, p in trained.items()} == {n: p.shape for n, p in twin.items()}
    with torch.no_grad():
        for name, parameter in trained.items():
            twin[name].copy_(parameter)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    expected = plain(x).detach().index_copy(-1, torch.tensor(ROWS), small["qkv_proj"](x))
    found = model(x)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[..., ROWS], plain(x)[..., ROWS])
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, twin[name].grad)
    before = model.qkv_proj.base_layer.weight.clone()
    merge(state)
    torch.testing.assert_close(model(x), found)
    unmerge(state)
    assert torch.equal(model.qkv_proj.base_layer.weight, before)


def test_compiled_mixed_and_counted() -> None:
    model, state = _adapted(CONFIGS["lora"])
    inject(plan(model, CONFIGS["c3a"], "two"), seed=1)
    _random(model, "two")
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    with opened(state, names=("two", BASE, "default")):
        mixed = model(x)
    for row, name in enumerate(("two", BASE, "default")):
        with opened(state, names=(name,)):
            torch.testing.assert_close(mixed[row], model(x[row : row + 1])[0])
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))
    assert plan(Block(), CONFIGS["lora"]).trainable == 2 * 8 + 2 * len(ROWS)


@pytest.mark.parametrize("method", ["lora", "gralora"])
def test_saved_loaded_and_exported_for_peft(method: str, tmp_path: Path) -> None:
    config = CONFIGS[method]
    torch.manual_seed(0)
    model = inlay.get_peft_model(Block(), config)
    _random(model)
    x = torch.randn(2, 8)
    expected = model(x)
    model.save_pretrained(tmp_path / "own")
    torch.manual_seed(0)
    again = inlay.PeftModel.from_pretrained(Block(), tmp_path / "own")
    assert torch.equal(again(x), expected)
    inlay.save_as_lora(tmp_path / "lora", model, rank=2 if method == "lora" else 8)
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(Block(), tmp_path / "lora")
    torch.testing.assert_close(theirs(x), expected, rtol=1e-4, atol=1e-5)
    rows = theirs.base_model.model.qkv_proj.lora_B["default"].weight
    others = [row for row in range(16) if row not in ROWS]
    assert rows.shape == (16, 2 if method == "lora" else 8)
    assert not rows[others].any()
    assert rows[ROWS].all()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (LoraConfig(target_modules=["qkv_proj[4:20]"]), r"has rows 0:16, and '4:20' is no range"),
        (LoraConfig(target_modules=["qkv_proj[4:8,7:9]"]), "some rows of 'qkv_proj' twice"),
        (LoraConfig(target_modules=["qkv_proj[q]"]), r"is not known .*qkv_proj\[0:8\].*qkv_proj of phi3"),
        (LoraConfig(target_modules=["qkv_proj[:4]", "qkv_proj[4:8]"]), "name the same layers"),
        (LoraConfig(target_modules=["kv_proj[:4]"]), "kv_proj"),
        (LoraConfig(target_modules=["norm[:4]"]), "only linear layers have slices"),
    ],
)
def test_what_is_no_slice_is_refused(config: Any, why: str) -> None:
    model = Block()
    model.norm = nn.LayerNorm(8)
    with pytest.raises(InlayError, match=why) as caught:
        plan(model, config)
    assert isinstance(caught.value, (TargetError, UnsupportedError, ValueError))


SMALL: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
MODELS: dict[str, tuple[str, Any]] = {
    "phi3": (
        "qkv_proj",
        lambda: transformers.Phi3Config(**SMALL, num_key_value_heads=2, intermediate_size=24, pad_token_id=0),
    ),
    "gpt2": ("c_attn", lambda: transformers.GPT2Config(vocab_size=32, n_embd=16, n_head=4, n_layer=1)),
    "bigcode_multi": (
        "c_attn",
        lambda: transformers.GPTBigCodeConfig(vocab_size=32, n_embd=16, n_head=4, n_layer=1, multi_query=True),
    ),
    "bigcode": (
        "c_attn",
        lambda: transformers.GPTBigCodeConfig(vocab_size=32, n_embd=16, n_head=4, n_layer=1, multi_query=False),
    ),
    "bloom": ("query_key_value", lambda: transformers.BloomConfig(vocab_size=32, hidden_size=16, n_head=4, n_layer=1)),
    "gpt_neox": ("query_key_value", lambda: transformers.GPTNeoXConfig(**SMALL, intermediate_size=24)),
    "persimmon": ("query_key_value", lambda: transformers.PersimmonConfig(**SMALL, intermediate_size=24)),
    "falcon": (
        "query_key_value",
        lambda: transformers.FalconConfig(**SMALL, num_kv_heads=2, new_decoder_architecture=True),
    ),
    "falcon_multi": ("query_key_value", lambda: transformers.FalconConfig(**SMALL, multi_query=True)),
    "falcon_rw": (
        "query_key_value",
        lambda: transformers.FalconConfig(**SMALL, multi_query=False, new_decoder_architecture=False, alibi=True),
    ),
}


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_named_parts_are_the_ones_that_the_model_reads(family: str) -> None:
    """Keys and values are what a model's cache holds; queries are in none of them."""
    leaf, config = MODELS[family]
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config()).eval()
    tokens = torch.arange(6).unsqueeze(0)
    before = base(tokens, use_cache=True)
    for part in "qkv":
        model = copy.deepcopy(base)
        inject(plan(model, LoraConfig(r=2, target_modules=[f"{leaf}[{part}]"])), seed=1)
        for name, parameter in model.named_parameters():
            if ".default" in name:
                nn.init.normal_(parameter)
        after = model(tokens, use_cache=True)
        old, new = before.past_key_values.layers[0], after.past_key_values.layers[0]
        keys, values = (new.keys != old.keys), (new.values != old.values)
        assert bool(keys.any()) == (part == "k")
        assert bool(values.any()) == (part == "v")
        changed = {"k": keys, "v": values}.get(part)
        if changed is not None:  # in every head
            assert changed.any(-1).any(-1).all()
        assert not torch.equal(after.logits, before.logits)


@torch.no_grad()
def test_gate_and_up_are_halves() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS["phi3"][1]()).eval()
    made = plan(model, LoraConfig(r=2, target_modules=["gate_up_proj[up]"]))
    inject(made, seed=1)
    mlp = model.model.layers[0].mlp
    _random(model)
    x = torch.randn(2, 16)
    gate, up = mlp.gate_up_proj(x).chunk(2, -1)
    old_gate, old_up = mlp.gate_up_proj.base_layer(x).chunk(2, -1)
    assert torch.equal(gate, old_gate)
    assert not torch.equal(up, old_up)
    torch.testing.assert_close(mlp(x), mlp.down_proj(up * mlp.activation_fn(gate)))


def test_low_rank_slices_run_fused() -> None:
    model, _ = _adapted(CONFIGS["lora"])
    (one,) = inlay.explain(model)
    assert one.path == "fused"
