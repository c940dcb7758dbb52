"""LoRA-FA beside peft, and where peft pairs the wrong parameters."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import peft
import peft.optimizers as theirs
import pytest
import torch
from optimizer_twins import llama, same_groups, same_weights, train, twins
from peft.optimizers.lorafa import LoraFAOptimizer as TheirLoraFA
from torch import nn

import inlay
import inlay.training.optimizers as ours


def test_the_signature_of_the_class():
    mine, real = (inspect.signature(cls).parameters for cls in (ours.LoraFAOptimizer, TheirLoraFA))
    assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in real.values()]


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
