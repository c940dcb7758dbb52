"""What is adapted here and not with PEFT: parts of models and layers, parameters, second adapters, half precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from cells import METHODS
from torch import Tensor, nn

import inlay
from inlay.core.plan import plan
from inlay.core.registry import BUILTIN_METHODS
from inlay.errors import UnsupportedError


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language, self.vision = (nn.ModuleDict({"q": nn.Linear(12, 8)}) for _ in range(2))
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.language["q"](x) + self.vision["q"](x)


def towers() -> Towers:
    torch.manual_seed(0)
    return Towers()


def adapted(model: nn.Module) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


def test_a_scope_is_a_part_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="scope"):
        peft.LoraConfig(target_modules=["q"], scope="language")
    model = inlay.get_peft_model(towers(), inlay.LoraConfig(target_modules=["q"], scope="language"))
    assert adapted(model.get_base_model()) == {"language.q"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["scope"] == "language"
    with pytest.warns(UserWarning, match="scope"):  # which it drops
        config = peft.PeftConfig.from_pretrained(tmp_path)
    assert adapted(peft.get_peft_model(towers(), config).get_base_model()) == {"language.q", "vision.q"}


def test_a_slice_of_a_fused_layer() -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.get_peft_model(towers(), peft.LoraConfig(r=2, target_modules=["q[0:4]"]))
    model = inlay.get_peft_model(towers(), inlay.LoraConfig(r=2, target_modules=["q[0:4]"]))
    assert adapted(model.get_base_model()) == {"language.q", "vision.q"}


class Scaled(nn.Module):
    """An affine layer of a class that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2.0) @ (self.weight.t() / 2.0)


def test_a_linear_layer_of_an_unknown_class() -> None:
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(nn.ModuleDict({"q": Scaled()}), peft.LoraConfig(r=2, target_modules=["q"]))
    model = inlay.get_peft_model(nn.ModuleDict({"q": Scaled()}), inlay.LoraConfig(r=2, target_modules=["q"]))
    assert adapted(model.get_base_model()) == {"q"}


def config_of(kind: str) -> Any:
    return next(c for c in (m({"target_modules": ["q"]}) for m in METHODS.values()) if c.peft_type.value == kind)


def test_parameters_are_targets_of_every_method() -> None:
    there = {
        kind
        for kind in BUILTIN_METHODS
        if "target_parameters" in getattr(peft, type(config_of(kind)).__name__).__dataclass_fields__
    }
    assert there == {"LORA", "ADALORA"}
    for kind in BUILTIN_METHODS:
        assert "target_parameters" in type(config_of(kind)).__dataclass_fields__, kind
    with pytest.raises(TypeError, match="target_parameters"):
        peft.LoHaConfig(r=2, target_modules=[], target_parameters=["language.q.weight"])
    config = inlay.LoHaConfig(r=2, target_modules=[], target_parameters=["language.q.weight"])
    model = inlay.get_peft_model(towers(), config)
    assert any("hada_w1_a" in name and "language" in name for name, _ in model.named_parameters())


def second(model: Any, config: Any, x: Tensor) -> Tensor:
    model.add_adapter("two", config)
    model.set_adapter("two")
    y: Tensor = model(x)
    return y


def test_a_second_randlora_has_bases_and_a_rank_of_its_own() -> None:
    """PEFT has one pair of bases for all adapters, which those of a larger rank do not fit."""
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    settings = [{"r": 2, "randlora_alpha": 4}, {"r": 4, "randlora_alpha": 8}]
    theirs = peft.get_peft_model(towers(), peft.RandLoraConfig(target_modules=["q"], **settings[0]))
    ours = inlay.get_peft_model(towers(), inlay.RandLoraConfig(target_modules=["q"], **settings[0]))
    with pytest.raises(ValueError, match="a size of 2 but 4 or greater is required"):
        second(theirs, peft.RandLoraConfig(target_modules=["q"], **settings[1]), x)
    ours.add_adapter("two", inlay.RandLoraConfig(target_modules=["q"], **settings[1]))
    alone = inlay.get_peft_model(towers(), inlay.RandLoraConfig(target_modules=["q"], **settings[1]))
    ours.set_adapter("two")
    for model in (ours, alone):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lambda" in name and (model is alone or ".two" in name):
                    parameter.fill_(0.3)
    torch.testing.assert_close(ours(x), alone(x))


def test_pvera_on_a_norm_has_no_place_for_its_noise() -> None:
    with pytest.raises(ValueError, match="No layers types compatible with PVeRA"):
        peft.get_peft_model(towers(), peft.PveraConfig(r=2, target_modules=["norm"]))
    with pytest.raises(UnsupportedError, match="draws noise in a forward pass"):
        plan(towers(), inlay.PveraConfig(r=2, target_modules=["norm"]))
    assert plan(towers(), inlay.PveraConfig(r=2, target_modules=["norm"], inference_mode=True)).placements


@pytest.mark.parametrize("method", ["monteclora", "miss"])
def test_adapters_in_half_precision(method: str) -> None:
    """PEFT draws MonteCLoRA's noise in float32, and a merge leaves MiSS's mini form repeated in the adapter."""
    for library in (peft, inlay):
        if method == "miss":
            config = library.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=["q"])
        else:
            options = library.MontecloraConfig(num_samples=3)
            config = library.LoraConfig(r=4, monteclora_config=options, target_modules=["q"])
        model = library.get_peft_model(towers().half(), config, autocast_adapter_dtype=False)

        def run(model: Any = model) -> None:
            model(torch.randn(3, 12).half())
            model.merge_adapter()
            model.unmerge_adapter()

        if library is inlay:
            run()
            assert model.get_base_model().language["q"].weight.dtype == torch.float16
        else:
            with pytest.raises(RuntimeError, match="must"):
                run()
