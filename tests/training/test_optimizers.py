"""The optimisers of ``peft.optimizers`` beside the real ones: groups, steps, errors, and in transformers' Trainer."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import types
from typing import Any

import peft
import peft.optimizers as theirs
import pytest
import torch
from optimizer_twins import llama, same_groups, same_weights, train, twins
from torch import nn

import inlay
import inlay.training.optimizers as ours

NAMES = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    mine, real = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [(p.name, p.kind, p.default) for p in real.values()]


def test_nothing_heavy_is_imported():
    code = "import sys, inlay.training.optimizers; print({'transformers', 'accelerate', 'peft'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# -- LoRA+ ------------------------------------------------------------------------------------------------------------

PLUS = {
    "plain": {},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "bias": {"bias": "lora_only", "lora_bias": True},
    "dora": {"use_dora": True},
    "full copies": {"modules_to_save": ["lm_head", "post_attention_layernorm"]},
    "tokens": {"trainable_token_indices": [1, 2]},
}


@pytest.mark.parametrize("fields", PLUS.values(), ids=PLUS)
@pytest.mark.parametrize(
    "more", [{}, {"loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-3, "betas": (0.8, 0.9)}], ids=["", "decay"]
)
def test_lora_plus(fields, more):
    mine, real = twins(fields)
    arguments: dict[str, Any] = {"lr": 5e-3, "loraplus_lr_ratio": 4.0} | more
    optimizers = [
        module.create_loraplus_optimizer(model, torch.optim.AdamW, **copy.deepcopy(arguments))
        for module, model in ((ours, mine), (theirs, real))
    ]
    same_groups(*optimizers, mine, real)
    start = copy.deepcopy(mine)
    train(mine, optimizers[0])
    train(real, optimizers[1])
    same_weights(mine, real)
    assert any(not torch.equal(a, b) for a, b in zip(start.parameters(), mine.parameters(), strict=True))


def test_lora_plus_takes_any_optimizer():
    mine, real = twins()
    for module, model in ((ours, mine), (theirs, real)):
        optimizer = module.create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2, momentum=0.5)
        assert isinstance(optimizer, torch.optim.SGD)
        train(model, optimizer)
    same_weights(mine, real)


def test_eight_bit_optimizers_keep_embeddings_in_full(monkeypatch):
    seen: list[tuple[Any, ...]] = []

    class Manager:
        @classmethod
        def get_instance(cls):
            return cls()

        def register_module_override(self, *arguments):
            seen.append(arguments)

    fake = types.ModuleType("bitsandbytes")
    fake.optim = types.SimpleNamespace(GlobalOptimManager=Manager)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    eight_bit = type("AdamW8bit", (torch.optim.AdamW,), {})
    counts = []
    for module, model in zip((ours, theirs), twins(), strict=True):
        module.create_loraplus_optimizer(model, eight_bit, lr=0.1, loraplus_lr_ratio=2)
        assert all(arguments[1:] == ("weight", {"optim_bits": 32}) for arguments in seen)
        assert all(isinstance(arguments[0], nn.Embedding) for arguments in seen)
        counts.append(len(seen))
        seen.clear()
    assert counts == [1, 1]


# -- Riemannian -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fields", [PLUS["plain"], PLUS["embedding"], PLUS["dora"], PLUS["full copies"]])
@pytest.mark.parametrize("reg", [{}, {"reg": 0.3}], ids=str)
def test_riemannian(cls, fields, reg):
    mine, real = twins(fields)
    optimizers = [
        module.create_riemannian_optimizer(model, cls, lr=2e-2, weight_decay=0.1, **reg)
        for module, model in ((ours, mine), (theirs, real))
    ]
    same_groups(*optimizers, mine, real)
    plain = copy.deepcopy(mine)
    train(mine, optimizers[0])
    train(real, optimizers[1])
    same_weights(mine, real)
    train(plain, cls([p for p in plain.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.1))
    with pytest.raises(AssertionError):
        same_weights(plain, real)
    assert isinstance(optimizers[0], cls)
    assert type(optimizers[0]).__name__ == type(optimizers[1]).__name__


def test_riemannian_in_half_precision():
    mine, _ = twins()  # one model for both, because the two libraries round its products in other places
    pairs = [mine.to(torch.bfloat16), copy.deepcopy(mine)]
    for module, model in zip((ours, theirs), pairs, strict=True):
        train(model, module.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2))
    found, expected = (dict(model.named_parameters()) for model in pairs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_riemannian_refuses():
    mine, real = twins()
    for module, model in ((ours, mine), (theirs, real)):
        with pytest.raises(TypeError):
            module.create_riemannian_optimizer(model, nn.Linear, lr=0.1)
        with pytest.raises(TypeError):
            module.create_riemannian_optimizer(model, "AdamW", lr=0.1)
        with pytest.raises(ValueError, match="step"):
            module.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=0.1)
        with pytest.raises(ValueError, match="lora_A"):
            module.create_riemannian_optimizer(llama(), torch.optim.AdamW, lr=0.1)
        optimizer = module.create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.1)
        with pytest.raises(ValueError, match="closure"):
            optimizer.step(lambda: 1.0)


def test_step_hooks_run_once():
    """peft calls the step of a class that torch has put its hooks around, and so calls them twice."""
    counts = []
    for module, model in zip((ours, theirs), twins(), strict=True):
        torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # makes torch put the hooks there
        optimizer = module.create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.1)
        seen: list[int] = []
        optimizer.register_step_pre_hook(lambda *arguments, seen=seen: seen.append(1))
        train(model, optimizer, 1)
        counts.append(len(seen))
    assert counts == [1, 2]


def test_experts_are_apart():
    """A bank's factors hold those of all experts; peft takes them for one pair of another order."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"hidden_size": 6, "intermediate_size": 4, "num_local_experts": 3, "num_experts_per_tok": 2}

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = MixtralExperts(MixtralConfig(**sizes))
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.3)

        def forward(self, x: Any) -> Any:
            return self.experts(x, torch.tensor([[0, 1], [1, 2], [2, 0]]), torch.full((3, 2), 0.5))

    torch.manual_seed(0)
    config: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": [], "init_lora_weights": False}
    config["target_parameters"] = ["experts.down_proj"]
    bank = Bank()
    model = inlay.get_peft_model(copy.deepcopy(bank), inlay.LoraConfig(**config))
    A, B = (next(p for name, p in model.named_parameters() if part in name) for part in ("lora_A", "lora_B"))
    x = torch.randn(3, 6)
    before = [A.detach().clone(), B.detach().clone()]
    optimizer = ours.create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=0.1)
    model(x).square().sum().backward()
    grad_A, grad_B = A.grad.clone(), B.grad.clone()
    optimizer.step()
    identity = 0.1 * torch.eye(2)
    for expert in range(3):
        rows, columns = slice(2 * expert, 2 * expert + 2), slice(expert, None, 3)  # A: slowest, B: fastest
        a, b = before[0][rows], before[1][:, columns]
        step_A = torch.linalg.inv(b.T @ b + identity) @ grad_A[rows]
        step_B = grad_B[:, columns] @ torch.linalg.inv(a @ a.T + identity)
        torch.testing.assert_close(a - A[rows], step_A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b - B[:, columns], step_B, rtol=1e-4, atol=1e-5)
    real = peft.get_peft_model(bank, peft.LoraConfig(**config))
    pair = [next(p for name, p in real.named_parameters() if part in name) for part in ("lora_A", "lora_B")]
    with torch.no_grad():
        for parameter, value in zip(pair, before, strict=True):
            parameter.copy_(value)
    optimizer = theirs.create_riemannian_optimizer(real, torch.optim.SGD, lr=1.0, reg=0.1)
    real(x).square().sum().backward()
    torch.testing.assert_close(pair[0].grad, grad_A, rtol=1e-4, atol=1e-5)
    optimizer.step()
    assert not torch.allclose(pair[0], A, atol=1e-3)


# -- in a trainer -----------------------------------------------------------------------------------------------------


def _made(module: Any, name: str, model: Any) -> torch.optim.Optimizer:
    if name == "lora plus":
        return module.create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4)
    if name == "lora fa":
        return module.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)
    return module.create_riemannian_optimizer(model, torch.optim.AdamW, lr=1e-2)


@pytest.mark.parametrize("name", ["lora plus", "lora fa", "riemannian"])
def test_in_the_trainer(tmp_path, name):
    """With its schedule, clipping and accumulation; the weights are those that peft's optimiser gives."""
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(32, (8, 6), generator=torch.Generator().manual_seed(4))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    results = []
    for module, model in zip((ours, theirs), twins({"task_type": "CAUSAL_LM"}), strict=True):
        arguments = TrainingArguments(
            str(tmp_path / str(len(results))),
            max_steps=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            report_to=[],
            use_cpu=True,
            save_steps=2,
            disable_tqdm=True,
        )
        optimizer = _made(module, name, model)
        Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None)).train()
        results.append(model)
    same_weights(*results)
    assert (tmp_path / "0" / "checkpoint-2" / "optimizer.pt").is_file()
