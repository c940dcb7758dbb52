"""Objects of PEFT and their counterparts, made by the same code from the same weights."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from inlay.compat import namespace


class Layers(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(12, 8)
        self.lin = nn.Linear(8, 8)
        self.conv1 = nn.Conv1d(4, 8, 3)
        self.conv2 = nn.Conv2d(4, 8, 3)
        self.conv3 = nn.Conv3d(4, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.mha = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 2)


class Experts(nn.Module):
    """A bank of expert weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->bo", x, self.weight)


class Bank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()


LAYERS = ["lin", "conv1", "conv2", "conv3", "emb", "mha"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"target_modules": LAYERS, "modules_to_save": ["head"]}),
    "dora": ("LoraConfig", {"target_modules": ["lin"], "use_dora": True}),
    "tokens in lora": ("LoraConfig", {"target_modules": ["lin"], "trainable_token_indices": {"emb": [1, 2]}}),
    "ia3": ("IA3Config", {"target_modules": ["lin", "conv2", "conv3"], "feedforward_modules": ["lin"]}),
    "loha": ("LoHaConfig", {"target_modules": ["lin", "conv1", "conv2"]}),
    "oft": ("OFTConfig", {"target_modules": ["lin", "conv2", "emb"], "oft_block_size": 4}),
    "vera": ("VeraConfig", {"target_modules": ["lin", "head"]}),
    "fourierft": ("FourierFTConfig", {"target_modules": ["lin"], "n_frequency": 10}),
    "ln": ("LNTuningConfig", {"target_modules": ["norm"]}),
    "tokens": ("TrainableTokensConfig", {"target_modules": ["emb"], "token_indices": [1, 2]}),
    "mixed": ("LoraConfig", {"target_modules": ["lin"]}),
}
TASKS = ["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"]


def made(peft: ModuleType, name: str) -> Any:
    """Return a model of one case, made with the functions of ``peft``."""
    torch.manual_seed(0)
    config, fields = CASES[name]
    return peft.get_peft_model(Layers(), getattr(peft, config)(**copy.deepcopy(fields)), mixed=name == "mixed")


def banks(peft: ModuleType) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(Bank(), peft.LoraConfig(target_modules=[], target_parameters=["experts.weight"]))


def tasks(peft: ModuleType) -> Iterator[Any]:
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        T5Config,
        T5ForConditionalGeneration,
    )

    small = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=1)
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    t5 = T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    for task, model in (
        ("CAUSAL_LM", GPT2LMHeadModel(small)),
        ("SEQ_2_SEQ_LM", T5ForConditionalGeneration(t5)),
        ("SEQ_CLS", BertForSequenceClassification(bert)),
        ("TOKEN_CLS", BertForTokenClassification(bert)),
        ("QUESTION_ANS", BertForQuestionAnswering(bert)),
        ("FEATURE_EXTRACTION", BertModel(bert)),
    ):
        yield peft.get_peft_model(model, peft.LoraConfig(task_type=task, r=4))


def pairs() -> Iterator[tuple[Any, Any]]:
    """Iterate over objects of PEFT with their counterparts: models, tuners, layers, wrappers and configurations."""
    theirs, ours = importlib.import_module("peft"), importlib.import_module(namespace.ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CASES:
            yield from _both(made(theirs, name), made(ours, name))
        yield from _both(banks(theirs), banks(ours))
        yield from zip(tasks(theirs), tasks(ours), strict=True)


def _both(left: Any, right: Any) -> Iterator[tuple[Any, Any]]:
    yield left, right
    yield left.base_model, right.base_model
    yield left.peft_config["default"], right.peft_config["default"]
    bare = dict(right.base_model.model.named_modules())
    for path, module in left.base_model.model.named_modules():
        own = type(module).__module__
        if own.startswith("peft.") and path in bare:
            yield module, bare[path]
