"""``scope``: one part of a model is adapted, whatever the names in other parts are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.core.plan import Plan, plan
from inlay.errors import NoTargetError, TargetError
from inlay.methods.adalora import AdaLoraConfig
from inlay.methods.loha import LoHaConfig
from inlay.methods.lora import LoraConfig


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.bank = nn.ParameterDict({"w": torch.zeros(2, 4, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.k(self.q(x)))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"vision": Tower(), "language_model": Tower(), "language": Tower()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(tower(x) for tower in self.model.values())


def paths(made: Plan) -> set[str]:
    return {p.site.name for p in made.placements} | {place.path for place, _ in made.copies}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"target_modules": ["q"]}, {"q"}),
        ({"target_modules": "all-linear"}, {"q", "k"}),
        ({"target_modules": r".*\.(q|k)"}, {"q", "k"}),
        ({"target_modules": ["k"], "modules_to_save": ["norm"]}, {"k", "norm"}),
        ({"target_modules": [], "target_parameters": ["bank.w"]}, {"bank.w"}),
        ({"target_modules": ["q", "k"], "exclude_modules": ["k"]}, {"q"}),
    ],
)
@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig])
def test_only_what_lies_below_it(config: Any, fields: dict[str, Any], found: set[str]) -> None:
    made = plan(TwoTowers(), config(r=2, scope="model.language_model", **fields))
    assert paths(made) == {f"model.language_model.{name}" for name in found}


def test_what_is_not_there_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(TargetError, match=r"no module 'model.langage_model'.*'model.language_model'"):
        plan(TwoTowers(), LoraConfig(target_modules=["q"], scope="model.langage_model"))
    with pytest.raises(NoTargetError, match=r"'model\.vision' of TwoTowers"):
        plan(TwoTowers(), LoraConfig(target_modules="no", scope="model.vision"))
    with pytest.raises((TargetError, NoTargetError), match="vision"):
        plan(TwoTowers(), LoraConfig(target_modules=["model.language_model.q"], scope="model.vision"))


def test_saved_where_it_is_set_and_only_there(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = inlay.get_peft_model(TwoTowers(), LoHaConfig(r=2, target_modules="all-linear", scope="model.vision"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["scope"] == "model.vision"
    torch.manual_seed(0)
    again = inlay.PeftModel.from_pretrained(TwoTowers(), tmp_path)
    x = torch.randn(2, 4)
    assert torch.equal(again(x), model(x))
    assert {name for name, _ in again.named_modules() if name.endswith("base_layer")} == {
        f"base_model.model.model.vision.{name}.base_layer" for name in ("q", "k")
    }
    assert "scope" not in LoraConfig(target_modules=["q"]).to_dict()
    # all-linear was written out in names that mean the same to a reader that knows no scope
    unscoped = LoHaConfig(r=2, target_modules=saved["target_modules"])
    assert paths(plan(TwoTowers(), unscoped)) == {"model.vision.q", "model.vision.k"}


def test_it_takes_no_place_among_positional_arguments() -> None:
    assert AdaLoraConfig(total_step=3, scope="a").scope == "a"
    with pytest.raises(TypeError):
        LoHaConfig(*[None] * 99)
