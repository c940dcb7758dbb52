"""LoRA+, LoRA-FA and Riemannian preconditioning of LoRA's variants, on linear layers, convolutions and embeddings."""

from __future__ import annotations

import copy
from typing import Any

import peft
import peft.optimizers as theirs
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import inlay
import inlay.training.optimizers as ours

BLOCK_A = {"target_modules_bd_a": ["conv", "lin", "0"], "nblocks": 2, "match_strict": False}
BLOCK_B = {"target_modules_bd_b": ["conv", "lin", "0"], "nblocks": 2, "match_strict": False}


def variant(name: str, namespace: Any = inlay) -> dict[str, Any]:
    """The fields of a variant; several are joined by a plus."""
    fields: dict[str, dict[str, Any]] = {
        "plain": {},
        "dora": {"use_dora": True},
        "kasa": {"kasa_config": namespace.KasaConfig()},
        "qalora": {"use_qalora": True, "qalora_group_size": 2},
        "block A": {"use_bdlora": namespace.BdLoraConfig(**BLOCK_A)},
        "block B": {"use_bdlora": namespace.BdLoraConfig(**BLOCK_B)},
        "velora": {"velora_config": namespace.VeloraConfig(num_groups=4, init_type="random")},
        "monteclora": {"monteclora_config": namespace.MontecloraConfig(num_samples=3, sample_scaler=0.1)},
    }
    found: dict[str, Any] = {}
    for part in name.split("+"):
        found |= fields[part]
    return found


# -- what a step is ---------------------------------------------------------------------------------------------------

SCALE = 1.5


def one_layer(name: str, namespace: Any = inlay) -> Any:
    torch.manual_seed(0)
    config = namespace.LoraConfig(
        r=4, lora_alpha=6, target_modules=["0"], init_lora_weights=False, **variant(name, namespace)
    )
    model = namespace.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model


def backward(model: Any) -> Tensor:
    """Leave gradients, and return that of the whole weight, (out, in)."""
    generator = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(7, n, generator=generator, dtype=torch.float64) for n in (8, 6))
    (model(x) * weights).sum().backward()
    return weights.T @ x


def factor(model: Any, container: str) -> tuple[str, nn.Parameter]:
    return next((name, p) for name, p in model.named_parameters() if f".{container}." in name and p.ndim == 2)


def jacobian(model: Any, container: str) -> Tensor:
    """How the weight changes with a factor, (out * in, entries of the factor), from what the layer really computes."""
    still = copy.deepcopy(model).eval()
    name, parameter = factor(still, container)
    unit = torch.eye(8, dtype=torch.float64)

    def weight(value: Tensor) -> Tensor:
        return functional_call(still, {name: value}, unit).T.flatten()

    return torch.autograd.functional.jacobian(weight, parameter.detach()).flatten(1)


LINEAR = ["plain", "kasa", "qalora", "block A", "block B", "velora", "monteclora"]
LINEAR += ["kasa+qalora", "kasa+block A", "kasa+block B", "qalora+block B"]


@pytest.mark.parametrize("name", LINEAR)
def test_lora_fa_comes_closest_to_the_whole_gradient(name: str) -> None:
    """In exact arithmetic: the change of B that changes the weight as its own gradient would."""
    model = one_layer(name)
    optimizer = ours.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1.0)
    if "monteclora" in name:
        model.eval()  # in training it draws A
    whole, J = backward(model), jacobian(model, "lora_B")
    best = torch.linalg.lstsq(J, whole.flatten()[:, None], driver="gelsd").solution
    optimizer.step()
    found = optimizer.state["base_model.model.0.lora"]["exp_avg_B"].flatten() / 0.1
    torch.testing.assert_close(found, best.flatten(), rtol=1e-5, atol=1e-6)


def metric_steps(model: Any) -> dict[str, Tensor]:
    """The gradients of A and B in the metric of the weight's changes, times the squared scale."""
    steps = {}
    for container in ("lora_A", "lora_B"):
        J = jacobian(model, container)
        gradient = factor(model, container)[1].grad
        assert gradient is not None
        steps[container] = SCALE**2 * torch.linalg.pinv(J.T @ J) @ gradient.flatten()
    return steps


def riemannian_steps(model: Any, module: Any) -> dict[str, Tensor]:
    optimizer = module.create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=0.0)
    before = {c: factor(model, c)[1].detach().clone() for c in ("lora_A", "lora_B")}
    optimizer.step()
    return {c: (value - factor(model, c)[1].detach()).flatten() for c, value in before.items()}


@pytest.mark.parametrize("name", LINEAR)
def test_riemannian_steps_are_those_of_the_weights_metric(name: str) -> None:
    model = one_layer(name)
    if "monteclora" in name:
        model.eval()
    backward(model)
    expected = metric_steps(model)
    found = riemannian_steps(model, ours)
    for container, step in expected.items():
        torch.testing.assert_close(found[container], step, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["plain", "kasa", "block A"])
def test_peft_takes_the_stored_factors_for_the_whole_update(name: str) -> None:
    """It forgets KaSA's singular values, and that blocks of a block-diagonal A have nothing to do with each other."""
    model = one_layer(name, peft)
    backward(model)
    expected = metric_steps(model)
    found = riemannian_steps(model, theirs)
    same = [torch.allclose(found[c], step, rtol=1e-5) for c, step in expected.items()]
    assert same == ([True, True] if name == "plain" else [False, False])


def test_peft_fails_on_a_block_diagonal_B() -> None:
    model = one_layer("block B", peft)
    backward(model)
    with pytest.raises(RuntimeError):
        riemannian_steps(model, theirs)


# -- which parameters, and that they learn ----------------------------------------------------------------------------


class Net(nn.Module):
    """Tokens (batch, 6) to (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.conv, self.lin = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.lin(self.conv(self.emb(tokens).mT).mT.mean(1))
        return y


VARIANTS = ["plain", "dora", "kasa", "qalora", "block A", "block B", "velora", "monteclora", "dora+kasa+block A"]


def net(name: str) -> Any:
    targets = ["conv", "lin"] if "velora" in name else ["emb", "conv", "lin"]  # which reads features, not indices
    torch.manual_seed(0)
    config = inlay.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False, **variant(name))
    model = inlay.get_peft_model(Net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))  # a block-diagonal B starts at zero
    return model


def made(kind: str, model: Any) -> torch.optim.Optimizer:
    if kind == "lora plus":
        more = {"loraplus_lr_ratio": 4.0, "loraplus_lr_embedding": 2e-3}
        return ours.create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, **more)
    if kind == "lora fa":
        return ours.create_lorafa_optimizer(model, r=4, lora_alpha=4, lr=1e-3)
    return ours.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)


@pytest.mark.parametrize("kind", ["lora plus", "lora fa", "riemannian"])
@pytest.mark.parametrize("name", VARIANTS)
def test_groups_hold_what_trains_and_a_step_lowers_the_loss(name: str, kind: str) -> None:
    model = net(name)
    wanted = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = made(kind, model)
    named = {id(p): n for n, p in model.named_parameters()}
    groups = [{named[id(p)] for p in group["params"]} & wanted for group in optimizer.param_groups]
    assert set.union(*groups) == wanted  # each in one group, which torch sees to
    if kind == "lora plus":
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [1e-3, 2e-3, 4e-3, 4e-3]
        assert groups[1] == {n for n in wanted if "lora_embedding_" in n}
        assert {n for n in wanted if ".lora_A." in n} <= groups[0]
        assert {n for n in wanted if ".lora_B." in n or ".lora_diag." in n or "lin.lora_magnitude" in n} <= groups[2]
    tokens = torch.arange(10).repeat(3).view(5, 6)
    target = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))

    def loss() -> Tensor:
        return (model(tokens) - target).square().mean()

    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.eval()
    with torch.no_grad():
        before = float(loss())
    model.train()
    loss().backward()
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, start[n])}
    frozen = {n for n in wanted if kind == "lora fa" and ".lora_A." in n}
    assert changed == wanted - frozen
    model.eval()
    with torch.no_grad():
        assert float(loss()) < before
