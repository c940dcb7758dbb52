"""The optimisers of ``peft.optimizers`` beside the real ones: groups, steps, errors, and in transformers' Trainer."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import types
import warnings
from typing import Any

import peft
import peft.optimizers as theirs
import pytest
import torch
from peft.optimizers.lorafa import LoraFAOptimizer as TheirLoraFA
from torch import nn

import inlay
import inlay.training.optimizers as ours

NAMES = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]


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


@pytest.mark.parametrize("name", NAMES)
def test_signatures(name):
    mine, real = (inspect.signature(getattr(module, name)).parameters for module in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [(p.name, p.kind, p.default) for p in real.values()]


def test_the_signature_of_the_class():
    mine, real = (inspect.signature(cls).parameters for cls in (ours.LoraFAOptimizer, TheirLoraFA))
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in real.values()]


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


# -- LoRA-FA ----------------------------------------------------------------------------------------------------------

FA = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "full copies": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("fields", FA.values(), ids=FA)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lora_fa(fields, decay, dtype):
    mine, real = twins(fields, dtype)
    optimizers = [
        module.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=5e-3, weight_decay=decay)
        for module, model in ((ours, mine), (theirs, real))
    ]
    same_groups(*optimizers, mine, real)
    start = {name: parameter.clone() for name, parameter in mine.named_parameters()}
    train(mine, optimizers[0])
    train(real, optimizers[1])
    same_weights(mine, real)
    for name, parameter in mine.named_parameters():
        if "lora_" in name:
            assert torch.equal(parameter, start[name]) is ("lora_A" in name), name
    states = [
        {name: {key: getattr(value, "shape", value) for key, value in held.items()} for name, held in one.state.items()}
        for one in optimizers
    ]
    assert states[0] == states[1]


def test_lora_fa_goes_on_from_a_state_that_peft_saved():
    mine, real = twins()
    make = {"r": 4, "lora_alpha": 6, "lr": 5e-3}
    first, second = ours.create_lorafa_optimizer(mine, **make), theirs.create_lorafa_optimizer(real, **make)
    train(real, second)
    mine.load_state_dict(real.state_dict())
    first.load_state_dict(copy.deepcopy(second.state_dict()))
    train(mine, first, 3)
    train(real, second, 3)
    same_weights(mine, real)


def test_lora_fa_is_the_projection_of_the_whole_gradient():
    """In exact arithmetic: the change of B that makes scale * dB A closest to the weight's own gradient."""
    torch.manual_seed(0)
    config = inlay.LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config).double()
    x, weights = torch.randn(7, 6).double(), torch.randn(7, 5).double()
    optimizer = ours.create_lorafa_optimizer(model, r=2, lora_alpha=3, lr=1.0)
    (model(x) * weights).sum().backward()
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    whole = weights.T @ x  # the gradient of the weight
    best = torch.linalg.lstsq(1.5 * A.T, whole.T).solution.T
    optimizer.step()
    state = optimizer.state["base_model.model.0.lora"]
    torch.testing.assert_close(state["exp_avg_B"] / 0.1, best, rtol=1e-5, atol=1e-6)
    assert B.grad is not None


def test_lora_fa_knows_pairs_by_name():
    """peft pairs whatever has `lora` in its name in the order of names, so magnitudes and biases break it."""
    for fields in ({"use_dora": True}, {"lora_bias": True}):
        mine, real = twins(fields)
        optimizer = ours.create_lorafa_optimizer(mine, r=4, lora_alpha=6, lr=5e-3)
        start = {name: parameter.clone() for name, parameter in mine.named_parameters()}
        train(mine, optimizer)
        for name, parameter in mine.named_parameters():
            if "lora_" in name:
                assert torch.equal(parameter, start[name]) is (".lora_A." in name), name
        with pytest.raises((RuntimeError, TypeError)):
            train(real, theirs.create_lorafa_optimizer(real, r=4, lora_alpha=6, lr=5e-3))


def test_lora_fa_trains_embeddings():
    """Their A starts at zero: frozen, as peft leaves it, the adapter would never change anything."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens"]}
    moved = []
    for namespace, module in ((inlay, ours), (peft, theirs)):
        model = namespace.get_peft_model(llama(), namespace.LoraConfig(**config))
        tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(4))
        before = model(input_ids=tokens).logits
        train(model, module.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=5e-2))
        moved.append(not torch.allclose(model(input_ids=tokens).logits, before, atol=1e-5))
    assert moved == [True, False]


def _groups_apart(model: Any, x: torch.Tensor, groups: int) -> list[Any]:
    """The gradients of A and B of a grouped convolution, group by group, as matrices."""
    model(x).square().sum().backward()
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return [
        (a.flatten(1), b.flatten(1), g.flatten(1))
        for a, b, g in zip(A.detach().chunk(groups), B.detach().chunk(groups), B.grad.chunk(groups), strict=True)
    ]


@pytest.mark.parametrize("groups", [1, 2])
def test_lora_fa_on_convolutions(groups):
    """peft fails on them. Each group of outputs has its own factors."""

    def conv(namespace: Any) -> Any:
        torch.manual_seed(0)
        config = namespace.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
        return namespace.get_peft_model(nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)), config)

    x = torch.randn(2, 4, 5, 5)
    model = conv(inlay)
    parts = _groups_apart(model, x, groups)
    optimizer = ours.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1)
    optimizer.step()
    expected = torch.cat([g @ torch.linalg.inv(a @ a.T) / 4.0 for a, _, g in parts])
    found = optimizer.state["base_model.model.0.lora"]["exp_avg_B"].flatten(1) / 0.1
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))  # bfloat16
    if groups == 1:
        real = conv(peft)
        real(x).square().sum().backward()
        with pytest.raises(RuntimeError):
            theirs.create_lorafa_optimizer(real, r=4, lora_alpha=8, lr=0.1).step()


def test_lora_fa_with_several_adapters():
    """Both train: each pair has a state of its own."""
    model = inlay.get_peft_model(llama(), inlay.LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("second", inlay.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter(["default", "second"])
    optimizer = ours.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.1)
    train(model, optimizer, 2)
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    assert {optimizer.state[name]["exp_avg_B"].shape[1] for name in (layer, f"{layer}.second")} == {2, 4}


def test_deprecated_arguments_of_lora_fa():
    for module, model in zip((ours, theirs), twins({"use_rslora": True}), strict=True):
        with pytest.warns(FutureWarning, match="use_rslora"):
            optimizer = module.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.1, use_rslora=True)
        assert optimizer.param_groups[0]["scaling_factor"] == 3.0
        with pytest.raises(ValueError, match="use_rslora"):
            module.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=0.1, use_rslora=False)


def test_groups_made_by_hand():
    mine, real = twins()
    for cls, model in ((ours.LoraFAOptimizer, mine), (TheirLoraFA, real)):
        named = dict(model.named_parameters())
        optimizer = cls([{"params": list(named.values()), "names": list(named), "scaling_factor": 1.5}], lr=5e-3)
        with pytest.warns(FutureWarning, match="scaling_factor"):
            train(model, optimizer, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, 2)
        with pytest.raises(KeyError, match="scaling_factors"):
            cls([{"params": list(named.values()), "names": list(named)}]).step()
    same_weights(mine, real)


@pytest.mark.parametrize(
    "numbers", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8}], ids=str
)
def test_numbers_out_of_range(numbers):
    for cls in (ours.LoraFAOptimizer, TheirLoraFA):
        with pytest.raises(ValueError, match=r".+"):
            cls([nn.Parameter(torch.ones(1))], **numbers)


def test_closures_of_lora_fa():
    mine, real = twins()
    tokens = torch.randint(32, (2, 6), generator=torch.Generator().manual_seed(4))
    for module, model in ((ours, mine), (theirs, real)):
        optimizer = module.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=5e-3)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
            return loss

        assert optimizer.step(closure) > 0
    same_weights(mine, real)


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
    pairs = [model.to(torch.bfloat16) for model in twins()]
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
    config = inlay.LoraConfig(
        r=2, lora_alpha=2, target_modules=[], target_parameters=["experts.down_proj"], init_lora_weights=False
    )
    model = inlay.get_peft_model(Bank(), config)
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
