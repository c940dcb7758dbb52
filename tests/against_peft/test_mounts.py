"""Every mount beside PEFT: names in memory and on disk, outputs, gradients, trained parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model_state_dict
from torch import Tensor, nn
from twins import PREFIX, close, ours_of

from inlay.checkpoint.keys import adapter_slots
from inlay.core.active import set_active
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.core.policy import INLAY, PEFT, Policy
from inlay.core.state import State
from inlay.errors import InlayWarning

TOKENS = torch.tensor([[1, 2, 3, 3], [4, 1, 0, 7]])


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, **options)
        self.lin = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.mha(x, x, x)[0])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 10, 8))
        self.matrix = nn.Parameter(torch.randn(8, 5))
        self.down = nn.Parameter(torch.randn(3, 8, 10))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("bi,eoi->ebo", x, self.up).tanh()
        return torch.einsum("ebi,eoi->bo", hidden, self.down) @ self.matrix


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.lin(x))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.classifier = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.dense(x))


def llama(tied: bool = True) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, tie_word_embeddings=tied, **sizes))


def mixture(family: str) -> nn.Module:
    import transformers

    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "num_experts_per_tok": 2}
    sizes |= {"Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 8}}.get(family, {"num_local_experts": 4})
    config = getattr(transformers, f"{family}Config")(**sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
SEQUENCES = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
BANKS = ["experts.up", "experts.down"]
MOE = ["experts.gate_up_proj", "experts.down_proj"]

# name -> model, input, config
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[], Any]]] = {
    "attention": (SelfAttention, SEQUENCES, lambda: LoraConfig(target_modules=["mha"])),
    "attention_batch_first": (
        lambda: SelfAttention(batch_first=True, bias=False),
        SEQUENCES,
        lambda: LoraConfig(target_modules=["mha"], rank_pattern={"mha": 3}, use_rslora=True),
    ),
    "attention_dropout": (SelfAttention, SEQUENCES, lambda: LoraConfig(target_modules=["mha"], lora_dropout=0.5)),
    "attention_bias": (SelfAttention, SEQUENCES, lambda: LoraConfig(target_modules=["mha"], bias="lora_only")),
    "parameters": (Bank, X, lambda: LoraConfig(target_parameters=BANKS, rank_pattern={"experts.down": 3})),
    "parameters_reversed": (Bank, X, lambda: LoraConfig(target_parameters=[*BANKS[::-1], "matrix"], lora_alpha=3)),
    "parameters_and_modules": (Bank, X, lambda: LoraConfig(target_parameters=BANKS, target_modules=["lin"])),
    "parameter_of_a_linear": (Bank, X, lambda: LoraConfig(target_parameters=["lin.weight"], use_rslora=True)),
    "copies": (Classifier, X, lambda: LoraConfig(target_modules=["dense"], modules_to_save=["classifier"])),
    "tokens": (llama, TOKENS, lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 3])),
    "tokens_by_name": (
        llama,
        TOKENS,
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [1], "embed_tokens": [3]}),
    ),
    "tokens_untied": (
        lambda: llama(tied=False),
        TOKENS,
        lambda: LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 3]),
    ),
    "tokens_alone": (llama, TOKENS, lambda: TrainableTokensConfig(token_indices=[1, 3])),
    "copies_tied": (
        llama,
        TOKENS,
        lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "copies_not_tied": (llama, TOKENS, lambda: LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "embedding_not_tied": (llama, TOKENS, lambda: LoraConfig(target_modules=["embed_tokens", "lm_head"])),
    "replication": (llama, TOKENS, lambda: LoraConfig(target_modules=["q_proj"], layer_replication=[(0, 2), (1, 3)])),
    "mixtral": (lambda: mixture("Mixtral"), TOKENS, lambda: LoraConfig(target_parameters=MOE)),
    "qwen3_moe": (lambda: mixture("Qwen3Moe"), TOKENS, lambda: LoraConfig(target_parameters=[*MOE, "mlp.gate.weight"])),
    "gpt_oss": (
        lambda: mixture("GptOss"),
        TOKENS,
        lambda: LoraConfig(target_parameters=MOE, target_modules=["q_proj"]),
    ),
}


class Pair:
    """PEFT's model and ours on equal weights, base and adapter alike."""

    def __init__(self, case: str, policy: Policy = PEFT) -> None:
        build, self.x, config = CASES[case]
        torch.manual_seed(0)
        base = build()
        self.ours = copy.deepcopy(base)
        self.base = copy.deepcopy(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = config()
            mine = ours_of(theirs)
            self.theirs: Any = peft.get_peft_model(base, theirs)
            self.state: State = inject(plan(self.ours, mine, policy=policy))
        self.equalise("default")

    def equalise(self, adapter: str) -> None:
        generator = torch.Generator().manual_seed(5)
        ours = dict(self.ours.named_parameters())
        with torch.no_grad():
            for name, parameter in self.theirs.named_parameters():
                if f".{adapter}" in name or parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                    ours[name.removeprefix(PREFIX)].copy_(parameter)

    def output(self, model: Any) -> Tensor:
        y = model(self.x)
        return y if isinstance(y, Tensor) else y.logits

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        y = self.output(model)
        (y * torch.linspace(-1.0, 2.0, y.numel()).cos().view(y.shape)).sum().backward()
        return {n.removeprefix(PREFIX): p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
def test_same_names_outputs_and_gradients(case: str) -> None:
    pair = Pair(case)
    trained = {n.removeprefix(PREFIX) for n, p in pair.theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in pair.ours.named_parameters() if p.requires_grad} == trained
    for training in (False, True):
        pair.theirs.train(training)
        pair.ours.train(training)
        expected = pair.output(pair.theirs)
        close(pair.output(pair.ours), expected)
        assert not torch.allclose(expected, pair.output(pair.base.train(training)), atol=1e-3)
    expected_gradients = pair.gradients(pair.theirs)
    gradients = pair.gradients(pair.ours)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        # PEFT adds this update twice (see below) and lets only one of them have a gradient.
        times = 2 if ".out_proj.lora_" in name else 1
        close(gradient, times * expected_gradients[name], 1e-4)


# a head that uses the embedding's tensors is saved twice by PEFT, with equal values
TWICE = {"tokens_alone": {"lm_head.trainable_tokens_delta"}, "copies_tied": {"lm_head.weight"}}


@pytest.mark.parametrize("case", CASES)
def test_same_keys_on_disk(case: str) -> None:
    pair = Pair(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = get_peft_model_state_dict(pair.theirs, save_embedding_layers=False)
    theirs = {name.removeprefix(PREFIX): tensor for name, tensor in held.items()}
    ours = adapter_slots(pair.ours)
    missing = theirs.keys() - ours.keys()
    assert ours.keys() <= theirs.keys()
    assert missing <= TWICE.get(case, set())
    for name, target in ours.items():
        assert torch.equal(target.tensor, theirs[name]), name


MERGED = [case for case in CASES if case not in ("tokens_by_name", "embedding_not_tied", "replication")]


@pytest.mark.parametrize("case", MERGED)
def test_same_merged_model(case: str) -> None:
    pair = Pair(case)
    pair.theirs.eval()
    pair.ours.eval()
    expected = pair.output(pair.theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = pair.theirs.merge_and_unload()
    merge(pair.state, keep="none")
    eject(pair.ours, pair.state, restore=False)
    close(pair.output(pair.ours), expected)
    merged = dict(theirs.named_parameters())
    assert {name: p.shape for name, p in pair.ours.named_parameters()} == {name: p.shape for name, p in merged.items()}
    for name, parameter in pair.ours.named_parameters():
        close(parameter, merged[name])


@pytest.mark.parametrize("case", ["attention", "parameters", "mixtral"])
def test_same_with_two_active_adapters(case: str) -> None:
    pair = Pair(case)
    config = CASES[case][2]()
    config.r = 3
    pair.theirs.add_adapter("second", config)
    pair.theirs.base_model.set_adapter(["default", "second"])
    inject(plan(pair.ours, ours_of(config), "second"))
    set_active(pair.state, ["default", "second"])
    pair.equalise("second")
    close(pair.output(pair.ours), pair.output(pair.theirs))


def test_attention_out_proj_counts_twice_in_peft() -> None:
    """PEFT adds the update of ``out_proj`` twice; Inlay does so under its policy only."""
    pair = Pair("attention", INLAY)
    theirs, ours = pair.output(pair.theirs), pair.output(pair.ours)
    assert not torch.allclose(ours, theirs, atol=1e-2)
    layer: Any = pair.ours.mha
    plain: Any = copy.deepcopy(pair.base)
    with torch.no_grad():
        for part, weight in ((layer, plain.mha.in_proj_weight), (layer.output, plain.mha.out_proj.weight)):
            weight += part.lora_B["default"].weight @ part.lora_A["default"].weight
        close(pair.output(pair.ours), pair.output(plain))
        plain.mha.out_proj.weight += layer.output.lora_B["default"].weight @ layer.output.lora_A["default"].weight
        close(theirs, pair.output(plain))


@pytest.mark.parametrize("policy", [INLAY, PEFT], ids=["inlay", "peft"])
def test_tied_update_is_one_set_of_parameters(policy: Policy) -> None:
    """PEFT gives the head parameters that alias the embedding's memory, so that an optimiser steps them twice."""
    torch.manual_seed(0)
    base = llama()
    ours: Any = copy.deepcopy(base)
    config = LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(base, config)
        inject(plan(ours, ours_of(config), policy=policy))
    aliases = {n.removeprefix(PREFIX): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert len(aliases) == 4
    assert len({p.data_ptr() for p in aliases.values()}) == 2
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert mine.keys() == {name for name in aliases if "embed_tokens" in name}
    with torch.no_grad():
        for name, parameter in mine.items():
            aliases[name].add_(0.1)
            parameter.copy_(aliases[name])
    close(ours(TOKENS).logits, theirs(TOKENS).logits, 1e-4)
    ours(TOKENS).logits.square().sum().backward()
    theirs(TOKENS).logits.square().sum().backward()
    A, B = (mine[f"model.embed_tokens.lora_embedding_{m}.default"] for m in "AB")
    head = {m: aliases[f"lm_head.lora_{m}.default.weight"].grad for m in "AB"}
    table = {m: aliases[f"model.embed_tokens.lora_embedding_{m}.default"].grad for m in "AB"}
    close(A.grad, table["A"] + head["B"].T, 1e-3)  # type: ignore[arg-type, operator, union-attr]
    close(B.grad, table["B"] + head["A"].T, 1e-3)  # type: ignore[arg-type, operator, union-attr]


def test_merging_into_a_shared_weight_is_wrong_in_peft_and_refused_here() -> None:
    pair = Pair("embedding_not_tied")
    expected = pair.output(pair.theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = pair.theirs.merge_and_unload()
    assert not torch.allclose(pair.output(merged), expected, rtol=0.1, atol=0.1)
    with pytest.raises(ValueError, match="shares its weight with"):
        merge(pair.state)
    close(pair.output(pair.ours), expected)


def test_both_warn_of_layers_that_are_not_tied() -> None:
    config = LoraConfig(target_modules=["embed_tokens"])
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        peft.get_peft_model(llama(), config)
    with pytest.warns(InlayWarning, match="share one weight"):
        plan(llama(), ours_of(config), policy=PEFT)


REFUSED: dict[str, dict[str, Any]] = {
    "dropout": {"target_parameters": BANKS, "lora_dropout": 0.1},
    "lora_bias": {"target_parameters": BANKS, "lora_bias": True},
    "fan_in_fan_out": {"target_parameters": BANKS, "fan_in_fan_out": True},
    "both": {"target_parameters": ["lin.weight"], "target_modules": ["lin"]},
    "one_axis": {"target_parameters": ["lin.bias"]},
    "nothing": {"target_parameters": ["nope"]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(name: str) -> None:
    config = LoraConfig(**REFUSED[name])
    with pytest.raises(ValueError):
        peft.get_peft_model(Bank(), config)
    with pytest.raises(ValueError):
        plan(Bank(), ours_of(config), policy=PEFT)
