"""What is done with adapters on slices: starts from data, copies, mixed batches, compiling, combining, converting."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sliced_models import PARTS, SLICES, Pair, adapters, configs, disturb, models
from torch import Tensor, nn

import inlay
from inlay.core.call import opened
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.state import BASE
from inlay.inits.corda import preprocess_corda
from inlay.inits.lora_ga import preprocess_loraga
from inlay.methods.lora import CordaConfig, EvaConfig, LoraConfig, LoraGAConfig


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("start", ["corda", "lora_ga", "eva"])
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_starts_from_data_measure_the_rows_of_the_slice(start: str, transposed: bool) -> None:
    x = batch(30)
    further: dict[str, Any] = {
        "corda": {"corda_config": CordaConfig(corda_method="kpm")},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
        "eva": {"eva_config": EvaConfig(rho=1.5)},
    }[start]
    apart = LoraConfig(r=2, init_lora_weights=start, target_modules=["first", "last"], **further)
    both = models(transposed)
    base = both[0](x).detach()
    for model, targets in zip(both, (PARTS, {"first", "last"}), strict=True):
        config = copy.deepcopy(apart)
        config.target_modules = targets
        if start == "corda":
            preprocess_corda(model, config, lambda model=model: model(x))
        elif start == "lora_ga":
            preprocess_loraga(model, config, lambda model=model: model(x).square().sum().backward())
        adapted = inlay.get_peft_model(model, config)
        if start == "eva":
            inlay.initialize_lora_eva_weights(adapted, [x], None, lambda m, b: m(b), None, None)
            assert adapted.peft_config["default"].target_modules == targets
    mine, theirs = dict(adapters(both[0])), dict(adapters(both[1]))
    assert mine
    assert any(bool(p.any()) for n, p in mine.items() if "lora_A" in n)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(both[0](x), base)
    for model in both:
        disturb(model)
    torch.testing.assert_close(both[0](x), both[1](x))


@pytest.mark.parametrize("method", ["lora", "lora_monteclora", "dora_bd", "oft", "vera", "adamss"])
def test_copies_and_pickles(method: str) -> None:
    model = models(False)[0]
    inject(plan(model, configs(method)[0]), seed=1)
    disturb(model)
    x, model = batch(2), model.eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
        with torch.no_grad():
            next(p for n, p in adapters(again) if p.requires_grad).add_(1.0)
        assert not torch.equal(again(x), model(x))


@pytest.mark.parametrize("method", ["ia3_input", "dora", "poly"])
def test_mixed_batches(method: str) -> None:
    model = models(False)[0].eval()
    state = inject(plan(model, configs(method)[0]), seed=1)
    inject(plan(model, configs("lora")[0], "two"), seed=1)
    disturb(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".two" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    x = batch(3, 2)
    with opened(state, names=("two", BASE, "default")):
        mixed = model(x)
    for row, name in enumerate(("two", BASE, "default")):
        with opened(state, names=(name,)):
            torch.testing.assert_close(mixed[row], model(x[row : row + 1])[0])


def test_compiled_in_one_graph() -> None:
    """A method that reads the rows of the base and has a forward pass of its own."""
    model = models(False)[0].eval()
    inject(plan(model, configs("dora")[0]), seed=1)
    disturb(model)
    x, layer = batch(3, 2), model.a
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x))


@pytest.mark.parametrize(
    "method", ["miss", "delora", "shira", "vera", "adalora", "lora_pissa", "dora", "oft", "adamss"]
)
def test_converted_to_a_lora_of_the_whole_layer(method: str, tmp_path: Path) -> None:
    x = batch(4).float()
    model = inlay.get_peft_model(models(False)[0].float(), configs(method)[0])
    disturb(model)
    expected = model.eval()(x)
    inlay.save_as_lora(tmp_path, model, rank=8)
    again = inlay.PeftModel.from_pretrained(models(False)[0].float(), tmp_path).eval()
    torch.testing.assert_close(again(x), expected, rtol=1e-4, atol=1e-4)
    for name, rows in SLICES.items():
        (B,) = (p for n, p in again.named_parameters() if f"{name}.lora_B.default.weight" in n)
        others = [row for row in range(20) if row not in rows]
        assert B.shape == (20, 8)
        torch.testing.assert_close(B[others], torch.zeros(len(others), 8), rtol=0, atol=1e-5)


def randomise(model: Any) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "base_layer" not in name:
                p.normal_(generator=torch.Generator().manual_seed(sum(map(ord, name)) % 1000), std=0.5)


@pytest.mark.parametrize("method", ["lora", "lora_bias", "loha", "fourierft", "beft", "vera"])
@pytest.mark.parametrize(
    "other", [PARTS, {"first[0:8]", "last[:3,15:20]"}, {"first", "last"}], ids=["same", "other", "whole"]
)
def test_weighted_sums(method: str, other: set[str]) -> None:
    """On the same slice where the parts are the same; of different parts, on all rows."""
    model = inlay.get_peft_model(models(False)[0], configs(method)[0])
    second = copy.deepcopy(configs(method)[0])
    second.target_modules = other
    model.add_adapter("two", second)
    randomise(model)
    x = batch(4)
    model.eval()
    with model.disable_adapter():
        base = model(x)
    updates = []
    for name in ("default", "two"):
        model.set_adapter(name)
        updates.append(model(x) - base)
    model.add_weighted_adapter(["default", "two"], [0.5, -2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    torch.testing.assert_close(model(x), base + 0.5 * updates[0] - 2.0 * updates[1])
    targets = set(model.peft_config["sum"].target_modules)
    assert (targets == PARTS) == (other is PARTS)


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_weighted_dora_is_that_of_a_layer_of_its_own(kind: str) -> None:
    outputs = []
    for model, config in zip(models(False), configs("dora"), strict=True):
        adapted = inlay.get_peft_model(model, config)
        adapted.add_adapter("two", copy.deepcopy(config))
        randomise(adapted)
        options = {} if kind == "cat" else {"svd_rank": 3}
        if kind == "ties_svd":
            options["density"] = 1.0
        adapted.add_weighted_adapter(["default", "two"], [0.5, -2.0], "sum", combination_type=kind, **options)
        adapted.set_adapter("sum")
        outputs.append(adapted.eval()(batch(4)))
    torch.testing.assert_close(outputs[0], outputs[1])


def test_sliced_adapters_of_one_model_add_up() -> None:
    """Chains of slices, of whole layers and of methods that read what is below."""
    model: Pair = models(False)[0].eval()
    state = inject(plan(model, configs("oft")[0], "default"), seed=1)
    inject(plan(model, configs("dora")[0], "two"), seed=1)
    inject(plan(model, LoraConfig(r=2, target_modules=["first", "last"]), "three"), seed=1)
    randomise(model)
    state.active = ("default", "two", "three")
    state.touch()
    x = batch(4)
    layer = model.a.first
    folded = layer.fold(layer.chain(None))
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, folded.weight, folded.bias))


def test_shares_by_size_are_those_of_the_slices() -> None:
    def entries(model: nn.Module, targets: list[str]) -> list[int]:
        config = inlay.WaveFTConfig(n_frequency=8, proportional_parameters=True, target_modules=targets)
        inlay.inject(inlay.plan(model, config))
        return [tensor.numel() for name, tensor in model.named_parameters() if "waveft" in name]

    fused = nn.ModuleDict({"a": nn.Linear(12, 20), "b": nn.Linear(12, 20)})
    apart = nn.ModuleDict({"a": nn.Linear(12, 8), "b": nn.Linear(12, 12)})
    found = entries(fused, ["a[0:8]", "b[0:12]"])
    assert found == entries(apart, ["a", "b"])
    assert found[0] != found[1]
