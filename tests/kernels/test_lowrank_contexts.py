"""The fused path under what else goes on around a layer: autocast, hooks, transforms, DDP, gradients of gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lowrank_models import OUT, VARIANTS, WIDTH, adapted, assert_same, batch, linear, off_by, run, run_generic, three
from torch import Tensor, nn

import inlay.core.fused as fused
from inlay.core.policy import INLAY, PEFT
from inlay.errors import UnsupportedError
from inlay.kernels.switch import fast_paths_on, without_fast_paths

F32 = torch.float32


@pytest.mark.parametrize("policy", [INLAY, PEFT], ids=["inlay", "peft"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant: str, policy: Any) -> None:
    """Against fp32: no further off than the generic path is."""
    model, _ = adapted(linear(), variant, policy, F32)
    x = batch(16, WIDTH, dtype=F32)
    exact = run_generic(model, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, generic = run(model, x), run_generic(model, x)
    assert found["y"].dtype == generic["y"].dtype
    for name, tensor in exact.items():
        assert found[name].dtype == generic[name].dtype, name
        assert off_by(found[name], tensor) <= 2 * off_by(generic[name], tensor) + 2**-7, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_hooks_on_the_base_layer_run_and_count(variant: str) -> None:
    model, _ = adapted(linear(), variant)
    x = batch(5, WIDTH)
    plain = run(model, x)
    calls: list[str] = []
    base = model.layer.base_layer
    base.register_forward_pre_hook(lambda module, args: calls.append("before"))
    base.register_forward_hook(lambda module, args, y: calls.append("after") or y + 1.0)  # type: ignore[func-returns-value]
    base.register_full_backward_hook(lambda module, gx, gy: calls.append("backward"))
    found = run(model, x)
    assert calls == ["before", "after", "backward"]
    assert off_by(found["y"], plain["y"]) > 1e-3
    assert_same(found, run_generic(model, x), 1e-12)


def test_a_parametrized_base_weight_is_computed_and_trained() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    model, _ = adapted(linear())
    before = run(model, batch(5, WIDTH))
    nn.utils.parametrize.register_parametrization(model.layer.base_layer, "weight", Scaled())
    found = run(model, batch(5, WIDTH))
    assert "layer.base_layer.parametrizations.weight.0.factor" in found
    assert off_by(found["y"], before["y"]) > 1e-3
    assert_same(found, run_generic(model, batch(5, WIDTH)), 1e-12)


@pytest.mark.parametrize("variant", ["lora", "two", "vera", "dora"])
def test_functorch_takes_the_generic_path(variant: str) -> None:
    model, _ = adapted(linear(), variant)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = batch(4, WIDTH)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).sin().sum()

    found = torch.func.grad(loss)(parameters, x)
    y = model(x)
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(y.sin().sum(), list(wanted.values()))
    for name, gradient in zip(wanted, gradients, strict=True):
        assert off_by(found[name], gradient) <= 1e-12, name
    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for name in wanted:
        assert off_by(rows[name].sum(0), found[name]) <= 1e-12, name
    stacked = {name: torch.stack([p, p * 2]) for name, p in parameters.items()}
    assert torch.func.vmap(loss, in_dims=(0, None))(stacked, x).shape == (2,)
    _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert off_by(tangent, (model(x + 1) - y).detach()) <= 1e-10


@pytest.mark.parametrize("variant", ["lora", "two", "vera", "lora_bias"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradients_of_gradients(variant: str, p: float) -> None:
    name = "vera_dropout" if variant == "vera" else "lora_dropout"
    model, _ = adapted(three(), variant, targets=("q", "k", "v", "o"), **{name: p})
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = batch(4, WIDTH).requires_grad_()

    def penalty() -> list[Tensor]:
        torch.manual_seed(0)
        y = model.train()(x)
        first = torch.autograd.grad(y.sin().sum(), [x, *parameters], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *parameters]))

    found = penalty()
    if p:
        return_to = [tensor.detach().clone() for tensor in (x, *parameters)]
        step, slope = 1e-6, 0.0
        way = [torch.ones_like(tensor) for tensor in return_to]
        slope = sum(float((g * w).sum()) for g, w in zip(found, way, strict=True))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                for tensor, start, w in zip((x, *parameters), return_to, way, strict=True):
                    tensor.copy_(start + sign * step * w)
            torch.manual_seed(0)
            first = torch.autograd.grad(model(x).sin().sum(), [x, *parameters])
            values.append(float(sum(g.square().sum() for g in first)))
        measured = (values[0] - values[1]) / (2 * step)
        assert abs(slope - measured) <= 1e-5 * abs(measured)
        return
    with without_fast_paths():
        expected = penalty()
    for one, other in zip(found, expected, strict=True):
        assert off_by(one, other) <= 1e-11


def test_gradients_of_gradients_of_dora_are_refused_and_have_a_way() -> None:
    model, _ = adapted(linear(), "dora")
    x = batch(4, WIDTH).requires_grad_()
    with pytest.raises(UnsupportedError, match=r"gradients of gradients.*without_fast_paths"):
        torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    with without_fast_paths():
        (first,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    first.square().sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_batched_gradients(variant: str) -> None:
    """``is_grads_batched`` runs the hand-written backward under torch's older vmap."""
    model, _ = adapted(linear(), variant)
    x = batch(3, WIDTH).requires_grad_()
    y = model(x)
    ways = torch.eye(y.numel(), dtype=torch.float64).view(-1, *y.shape)
    (rows,) = torch.autograd.grad(y, x, ways, is_grads_batched=True, retain_graph=True)
    for way, row in zip(ways, rows, strict=True):
        assert off_by(row, torch.autograd.grad(y, x, way, retain_graph=True)[0]) <= 1e-12


def test_a_weight_written_between_forward_and_backward_is_noticed() -> None:
    model, _ = adapted(linear())
    y = model(batch(4, WIDTH).requires_grad_())
    with torch.no_grad():
        model.layer.base_layer.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(4, WIDTH), (2, 3, WIDTH), (WIDTH,)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_may_be_written_to(variant: str, shape: tuple[int, ...]) -> None:
    model, _ = adapted(linear(), variant)
    x = batch(*shape)
    expected = run_generic(model, x)

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model.layer

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y += 0.0
            return y.mul_(1.0)

    assert_same(run(InPlace(), x), expected, 1e-12)


def test_the_switch_is_the_threads_own_and_ends_with_its_block() -> None:
    import threading

    seen: list[bool] = []

    def dies() -> None:
        with without_fast_paths():
            seen.append(fast_paths_on())
            thread = threading.Thread(target=lambda: seen.append(fast_paths_on()))
            thread.start()
            thread.join()
            raise KeyError("inside")

    with pytest.raises(KeyError):
        dies()
    assert seen == [False, True]
    assert fast_paths_on()


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_data_parallel_reducer(variant: str) -> None:
    """DDP's hooks see every gradient of the hand-written backward; one process, so that it costs nothing."""
    model, _ = adapted(three(), variant, targets=("q", "k", "v", "o"))
    x = batch(5, WIDTH)
    expected = run_generic(copy.deepcopy(model), x)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            found = run(wrapped, x)
    finally:
        dist.destroy_process_group()
    assert_same({name.removeprefix("module."): tensor for name, tensor in found.items()}, expected, 1e-12)


def test_old_fp16_trainers_scale_and_the_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    real = fused.combined
    monkeypatch.setattr(fused, "combined", lambda *args, **kw: taken.append(1) or real(*args, **kw))  # type: ignore[func-returns-value]
    model, _ = adapted(linear(), dtype=torch.float16)
    x = batch(5, WIDTH, dtype=torch.float16)
    y = model(x)
    (y.float().sum() * 64).backward()
    assert taken == [1]
    assert y.shape == (5, OUT)
    gradient = model.layer.lora_B["number0"].weight.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
