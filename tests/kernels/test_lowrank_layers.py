"""A layer on the fused path equals the same layer on the generic one: dtypes, methods, shapes, what trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from lowrank_models import (
    OUT,
    VARIANTS,
    WIDTH,
    adapted,
    assert_same,
    batch,
    conv1d,
    linear,
    off_by,
    run,
    run_generic,
)
from torch import Tensor, nn

import inlay
import inlay.core.fused as fused
from inlay.core.policy import INLAY, PEFT, Policy
from inlay.kernels.switch import without_fast_paths

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "no bias": lambda: linear(bias=False),
    "conv1d": conv1d,
}
SHAPES: dict[str, Callable[[], Tensor]] = {
    "one axis": lambda: batch(WIDTH),
    "one row": lambda: batch(1, WIDTH),
    "two axes": lambda: batch(5, WIDTH),
    "three axes": lambda: batch(2, 3, WIDTH),
    "four axes": lambda: batch(2, 1, 3, WIDTH),
    "empty": lambda: batch(0, WIDTH),
    "empty inside": lambda: batch(2, 0, WIDTH),
    "expanded": lambda: batch(1, 1, WIDTH).expand(2, 3, WIDTH),
    "transposed": lambda: batch(WIDTH, 5).t(),
    "permuted": lambda: batch(3, 2, WIDTH).transpose(0, 1),
    "strided": lambda: batch(4, 2 * WIDTH)[:, ::2],
}
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the calls of the fused path, so that no test passes for having compared the generic path with itself."""
    calls: list[int] = []
    real = fused.combined

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(fused, "combined", counted)
    yield calls
    assert calls


@pytest.mark.parametrize(
    ("layer", "policy"),
    [("linear", INLAY), ("linear", PEFT), ("no bias", INLAY), ("conv1d", PEFT)],
    ids=["inlay", "peft", "inlay-no bias", "peft-conv1d"],
)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(variant: str, dtype: torch.dtype, policy: Policy, layer: str, taken: list[int]) -> None:
    model, _ = adapted(LAYERS[layer](), variant, policy, dtype)
    x = batch(7, WIDTH, dtype=dtype)
    expected = run_generic(model, x)
    assert not taken
    assert_same(run(model, x), expected, 8 * EPS[dtype])


@pytest.mark.parametrize(("layer", "variant"), [*(("linear", one) for one in VARIANTS), ("conv1d", "lora")])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, variant: str, layer: str, taken: list[int]) -> None:
    model, _ = adapted(LAYERS[layer](), variant)
    x = SHAPES[shape]()
    if layer == "conv1d" and shape == "permuted":
        x = x.contiguous()  # transformers' own layer cannot take it otherwise
    expected = run_generic(model, x)
    assert_same(run(model, x), expected, 1e-12)
    model.eval()
    with torch.no_grad():  # one LoRA adapter goes the short way
        assert off_by(model(x), expected["y"]) <= 1e-12


@pytest.mark.parametrize("trains", ["A", "B", "magnitude", "bias", "all", "nothing"])
@pytest.mark.parametrize("variant", ["lora", "lora_bias", "dora", "two"])
@pytest.mark.parametrize("wants", [True, False], ids=["x", "no x"])
def test_what_trains(variant: str, trains: str, wants: bool, taken: list[int]) -> None:
    model, _ = adapted(linear(), variant)
    parts = {"A": "lora_A", "B": "lora_B.number0.weight", "magnitude": "magnitude", "bias": "lora_B.number0.bias"}
    for name, parameter in model.named_parameters():
        if "base_layer" not in name:
            parameter.requires_grad_(trains == "all" or (trains in parts and parts[trains] in name))
    expected = run_generic(model, batch(7, WIDTH), wants)
    assert_same(run(model, batch(7, WIDTH), wants), expected, 1e-12)


@pytest.mark.parametrize("variant", ["lora", "dora", "two"])
@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
def test_a_base_layer_that_trains_gets_its_gradients(variant: str, trained: str, taken: list[int]) -> None:
    model, _ = adapted(linear(), variant)
    base = model.layer.base_layer
    base.weight.requires_grad_(trained != "bias")
    base.bias.requires_grad_(trained != "weight")
    expected = run_generic(model, batch(7, WIDTH))
    assert {f"layer.base_layer.{n}" for n in ("weight", "bias") if trained in (n, "both")} <= expected.keys()
    assert_same(run(model, batch(7, WIDTH)), expected, 1e-12)


def test_two_adapters_of_different_dtypes_multiply_in_the_wider(taken: list[int]) -> None:
    """PEFT runs each product in its adapter's dtype; one product for both must not be the narrower one's."""
    model, _ = adapted(linear(), "two", PEFT, torch.bfloat16)
    model.layer.lora_A["number0"].to(torch.bfloat16)
    model.layer.lora_B["number0"].to(torch.bfloat16)
    x = batch(64, WIDTH, dtype=torch.bfloat16)
    assert model.layer.lora_A["number1"].weight.dtype == torch.float32
    with without_fast_paths():
        generic = model(x)
    exact = _doubled(model)(x.double())
    assert off_by(model(x), exact) <= 1.1 * off_by(generic, exact)


def _doubled(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model).double()


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("autocast", [True, False], ids=["fp32 adapter", "bf16 adapter"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_low_precision_is_no_worse_than_that_of_peft(use_dora: bool, autocast: bool, taken: list[int]) -> None:
    """Errors against float64 with the same bf16 weights, beside PEFT with ``autocast_adapter_dtype=False``."""
    kwargs: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ["layer"], "use_dora": use_dora}
    torch.manual_seed(0)
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(96, 80))
    base.to(torch.bfloat16)
    theirs = peft.get_peft_model(
        _copied(base), peft.LoraConfig(init_lora_weights=False, **kwargs), autocast_adapter_dtype=False
    )
    config = inlay.LoraConfig(init_lora_weights=False, **kwargs)
    ours = inlay.get_peft_model(_copied(base), config, autocast_adapter_dtype=autocast)
    with torch.no_grad():
        values = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            parameter.copy_(values[name])
    exact = _doubled(ours)
    x = batch(256, 96, dtype=torch.bfloat16)
    found, peers = run(ours, x), run(theirs, x)
    with without_fast_paths():
        wanted = run(exact, x.double())
    for name, tensor in wanted.items():
        if "magnitude" in name and use_dora:
            continue  # summed over rows of rounded outputs by both; see the next line
        assert _error(found[name], tensor) <= 1.25 * _error(peers[name], tensor) + 1e-4, name
    if use_dora:
        (name,) = (name for name in wanted if "magnitude" in name)
        assert _error(found[name], wanted[name]) <= 0.02


def _copied(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def test_out_is_what_the_layer_has() -> None:
    model, _ = adapted(linear())
    assert model(batch(3, WIDTH)).shape == (3, OUT)
