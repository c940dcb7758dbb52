"""Expert banks in token space where something else is going on, and where they have to be rewritten."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from expert_banks import EXPERTS, IN, adapted, by_hand, experts, nested, routed, with_gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import inlay
from inlay.core.call import opened
from inlay.core.merge import merge, unmerge
from inlay.core.nest import why_generic
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.errors import ConfigError, RoutingError, UnsupportedError
from inlay.kernels.experts_forms import register_bank
from inlay.kernels.switch import without_fast_paths


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")  # type: ignore[arg-type]


def test_compiled_in_one_graph() -> None:
    layer, _ = adapted(experts("GptOssExperts"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = routed()
    want = with_gradients(layer, inputs)
    found = {key.removeprefix("_orig_mod."): value for key, value in with_gradients(compiled, inputs).items()}
    compare(found, want)


def test_compiled_with_dropout_and_one_bank() -> None:
    layer, _ = adapted(experts("MixtralExperts"), ranks=(2,), targets=["gate_up_proj"], lora_dropout=0.5)
    layer.train()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, index, weights = routed()
    torch.manual_seed(3)
    y = compiled(x, index, weights)
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    base, one = layer.get_base_layer(), layer
    A, B = one.lora_A["a"].weight.view(EXPERTS, 2, -1), one.lora_B["a"].weight.view(-1, 2, EXPERTS)
    want = torch.zeros_like(y)
    for t in range(x.shape[0]):
        for e, w in zip(index[t], weights[t], strict=True):
            row = base.gate_up_proj[e] @ x[t] + one.scaling["a"] * B[:, :, e] @ A[e] @ (x[t] * mask[t])
            want[t] += w * (base.down_proj[e] @ base._apply_gate(row))
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(reentrant: bool) -> None:
    layer, _ = adapted(experts("GptOssExperts"))
    layer.train()
    inputs = routed()
    want = with_gradients(layer, inputs)
    trained = [p for p in layer.parameters() if p.requires_grad]
    cotangent = torch.randn(want["output"].shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    checkpoint(layer, *inputs, use_reentrant=reentrant).backward(cotangent)
    found = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert len(found) == len(trained)
    compare({**found, "input 0": inputs[0].grad}, {name: want[name] for name in (*found, "input 0")})


@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_autocast(way: str) -> None:
    """As the module's own products do: grouped_mm does not follow autocast, the loop over experts does."""
    layer, _ = adapted(experts("MixtralExperts", way, torch.float32), ranks=(4,))
    inputs = routed(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(layer, inputs)
        y = layer(*inputs)
    want = with_gradients(layer, inputs)
    assert y.dtype == torch.float32
    for name in want:
        assert found[name].dtype == want[name].dtype
        error = ((found[name] - want[name]).norm() / want[name].norm()).item()
        assert error < 0.05, name
        assert way == "grouped_mm" or error > 1e-4, name


def test_gradients_of_gradients() -> None:
    layer, _ = adapted(experts("MixtralExperts"), ranks=(2,))
    inputs = routed(tokens=5)

    def second() -> tuple[Tensor, ...]:
        x = inputs[0]
        (first,) = torch.autograd.grad(layer(*inputs).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, *(p for p in layer.parameters() if p.requires_grad)])

    found = second()
    with without_fast_paths():
        for one, other in zip(found, second(), strict=True):
            torch.testing.assert_close(one, other)
    for one in nested(layer):
        one.lora_A["a"].weight.requires_grad_(False)
    with pytest.raises(UnsupportedError, match=r"gradients of gradients.*without_fast_paths"):
        second()


def test_hooks_of_the_module_run() -> None:
    layer, _ = adapted(experts("MixtralExperts"))
    want = layer(*routed())
    seen: list[Any] = []
    base = layer.get_base_layer()
    base.register_forward_pre_hook(lambda module, args: seen.append(module.num_experts))
    base.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(layer(*routed()), want * 2)
    assert seen == [EXPERTS]


def test_states_of_the_adapters() -> None:
    layer, state = adapted(experts("GptOssExperts"))
    inputs = routed()
    both, base = by_hand(layer)(*inputs), layer.get_base_layer()(*inputs)
    torch.testing.assert_close(layer(*inputs), both)
    with opened(state, disabled=True):
        torch.testing.assert_close(layer(*inputs), base)
    merge(state, ["a"])
    torch.testing.assert_close(layer(*inputs), both)
    with opened(state, disabled=True):
        torch.testing.assert_close(layer(*inputs), base)
    merge(state)
    torch.testing.assert_close(layer(*inputs), both)
    unmerge(state)
    torch.testing.assert_close(layer(*inputs), both)
    nested(layer)[0].scaling["a"] = 0.0
    assert not torch.allclose(layer(*inputs), both)
    torch.testing.assert_close(layer(*inputs), by_hand(layer)(*inputs))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(way: Any) -> None:
    layer, _ = adapted(experts("MixtralExperts"))
    other = way(layer)
    torch.testing.assert_close(other(*routed()), layer(*routed()))
    assert why_generic(other) is None


def test_adapters_by_sample() -> None:
    """Experts get the tokens of all samples, sample after sample."""
    layer, state = adapted(experts("MixtralExperts"))
    inputs = routed(tokens=4 * 6)
    with opened(state, names=["a", "__base__", "b", "a"]):
        y = layer(*inputs)
    for i, name in enumerate(["a", "__base__", "b", "a"]):
        part = tuple(t[6 * i : 6 * i + 6] for t in inputs)
        with opened(state, names=[name]):
            torch.testing.assert_close(y[6 * i : 6 * i + 6], layer(*part))
    assert not torch.allclose(y[:6], layer.get_base_layer()(*inputs)[:6])
    torch.testing.assert_close(y[6:12], layer.get_base_layer()(*inputs)[6:12])
    with opened(state, names=[*"aabba"]), pytest.raises(RoutingError):
        layer(*routed(tokens=24, chosen=2))


# -- where the parameter is rewritten --------------------------------------------------------------------------------


def reasons(layer: Any) -> set[str | None]:
    return {why_generic(one) for one in nested(layer)}


def test_reasons() -> None:
    layer, _ = adapted(experts("MixtralExperts"))
    base, inputs = layer.get_base_layer(), routed()
    want = layer(*inputs)
    with without_fast_paths():
        assert reasons(layer) == {"fast paths are switched off"}
    base._is_expert_parallel = True
    assert reasons(layer) == {"the experts are spread over processes"}
    base._is_expert_parallel = False
    base.config._experts_implementation = "deepgemm"
    assert reasons(layer) == {"experts_implementation='deepgemm' has kernels of its own"}
    base.config._experts_implementation = "eager"
    base.forward = lambda *args: type(base).forward(base, *args) + 1
    assert reasons(layer) == {"the module's forward was replaced"}
    del base.forward
    assert reasons(layer) == {None}
    base.down_proj.requires_grad_()
    assert reasons(layer) == {"down_proj trains itself"}
    torch.testing.assert_close(layer(*inputs), want)
    (gradient,) = torch.autograd.grad(layer(*inputs).sum(), base.down_proj)
    assert gradient.any()
    with torch.no_grad():
        assert reasons(layer) == {None}
    base.down_proj.requires_grad_(False)
    three = tuple(t[None] for t in inputs)
    with pytest.raises((IndexError, RuntimeError, ValueError)):  # the module itself takes matrices
        layer(*three)


def test_transforms_of_torch_func_are_left_to_autograd() -> None:
    layer, _ = adapted(experts("MixtralExperts", "batched_mm"))
    x, index, weights = (t.detach() for t in routed())
    found = torch.func.grad(lambda x: layer(x, index, weights).square().sum())(x)
    torch.testing.assert_close(
        found, torch.autograd.functional.jacobian(lambda x: layer(x, index, weights).square().sum(), x)
    )


class OwnBank(nn.Module):
    """Experts of another package: the router's choice is made inside, and the banks have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(IN, EXPERTS)
        self.w_in = nn.Parameter(torch.randn(EXPERTS, IN, 8))
        self.w_out = nn.Parameter(torch.randn(EXPERTS, 8, IN))

    def forward(self, x: Tensor) -> Tensor:
        scores, index = self.router(x).softmax(-1).topk(2)
        hidden = torch.einsum("ti,tkio->tko", x, self.w_in[index]).tanh()
        return (torch.einsum("tko,tkoi->tki", hidden, self.w_out[index]) * scores[..., None]).sum(1)


def own_bank(module: OwnBank, run: Any, x: Tensor) -> Tensor:
    scores, index = module.router(x).softmax(-1).topk(2)
    route = run.route(index, EXPERTS)
    rows = run.project("w_in", x, route, spread=True).tanh()
    rows = run.project("w_out", rows, route) * route.sorted(scores.reshape(-1, 1))
    return route.summed(rows)


def test_a_class_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.kernels import experts_forms

    layer, _ = adapted(OwnBank().double(), targets=["w_in", "w_out"])
    assert {"OwnBank" in str(reason) and "register_bank" in str(reason) for reason in reasons(layer)} == {True}
    want = with_gradients(layer, routed()[:1])
    with pytest.raises(UnsupportedError, match=r"lora_dropout=0.5"):
        adapted(OwnBank().double(), targets=["w_in", "w_out"], lora_dropout=0.5)
    monkeypatch.setattr(experts_forms, "_by_name", dict(experts_forms._by_name))
    monkeypatch.setattr(experts_forms, "_by_class", {})
    with pytest.raises(ConfigError, match="register_bank"):
        register_bank(OwnBank, own_bank, ())
    register_bank(OwnBank, own_bank, ("w_in", "w_out"), transposed=True)
    assert reasons(layer) == {None}
    compare(with_gradients(layer, routed()[:1]), want)


def test_dropout_is_honoured_or_refused() -> None:
    layer, _ = adapted(experts("MixtralExperts"), lora_dropout=0.5)
    layer.train()
    with without_fast_paths(), pytest.raises(UnsupportedError, match=r"lora_dropout=0.5.*fast paths are switched off"):
        layer(*routed())
    layer.eval()
    with without_fast_paths():
        layer(*routed())
    holder = nn.ModuleDict({"experts": experts("GptOssExperts")})
    config = inlay.LoraConfig(target_modules=[], target_parameters=["down_proj"], lora_dropout=0.5)
    with pytest.raises(UnsupportedError, match=r"lora_dropout=0.5"):  # as in PEFT, which has none there
        plan(holder, config, policy=PEFT)
    config = inlay.LoraConfig(target_modules=[], target_parameters=["down_proj_bias"], lora_dropout=0.5)
    with pytest.raises(UnsupportedError, match=r"lora_dropout=0.5"):
        plan(holder, config)
