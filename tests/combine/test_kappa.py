"""Choosing targets by condition number, beside PEFT."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import peft
import peft.helpers as theirs
import pytest
import torch

import inlay
from inlay.models import kappa as mine


class Experts(torch.nn.Module):
    def __init__(self, banks: int) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(banks, 6, 4))
        self.down_proj = torch.nn.Parameter(torch.randn(banks, 4, 3))
        self.other_proj = torch.nn.Parameter(torch.randn(banks, 4, 3))


def model(experts: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    layers: dict[str, torch.nn.Module] = {
        f"l{i}": torch.nn.Linear(5 + i, 7, dtype=torch.bfloat16 if i == 3 else None) for i in range(6)
    }
    layers["wide"] = torch.nn.Linear(40, 2)
    if experts:
        layers |= {f"moe{i}": Experts(3) for i in range(3)}
    return torch.nn.ModuleDict(layers)


def test_signatures_are_pefts():
    for name in ("find_kappa_target_modules", "KappaTuneSelector"):
        found, expected = (inspect.signature(getattr(module, name)).parameters for module in (mine, theirs))
        assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in expected.values()]
    for name in ("get_best_targets", "get_best_target_parameters"):
        found, expected = (
            inspect.signature(getattr(module.KappaTuneSelector, name)).parameters for module in (mine, theirs)
        )
        assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in expected.values()]


@pytest.mark.parametrize("experts", [True, False])
@pytest.mark.parametrize("top_p", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"max_dim_size_to_analyze": 7}, {"moe_param_suffixes": (".other_proj",)}])
def test_the_choice_is_pefts(options, top_p, experts):
    net = model(experts)
    found = inlay.find_kappa_target_modules(net, top_p, show_progress=False, **options)
    assert found == theirs.find_kappa_target_modules(net, top_p, show_progress=False, **options)
    assert found["target_modules"]
    assert (found["target_parameters"] is None) != experts


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"top_p": 0.3},
        {"num_modules": 2},
        {"num_modules": 99},
        {"threshold": 20.0},
        {"top_p": 0.1, "num_modules": 3},
    ],
)
def test_every_way_of_choosing(choice: dict[str, Any]):
    net = model()
    found, expected = (module.KappaTuneSelector(net, show_progress=False) for module in (mine, theirs))
    assert found.get_best_targets(**choice) == expected.get_best_targets(**choice)
    assert found.get_best_target_parameters(**choice) == expected.get_best_target_parameters(**choice)


def test_condition_numbers():
    weight = torch.randn(6, 4, dtype=torch.float64)
    assert mine.condition_number(weight) == pytest.approx(torch.linalg.cond(weight).item(), rel=1e-4)


def test_a_model_without_such_layers():
    empty = torch.nn.ModuleDict({"a": torch.nn.Conv2d(2, 2, 1)})
    assert mine.find_kappa_target_modules(empty) == theirs.find_kappa_target_modules(empty, show_progress=False)


def test_adapters_are_not_candidates():
    """PEFT counts the factors of the adapters among the model's layers."""
    net = model()
    plain = inlay.find_kappa_target_modules(net, 1.0, show_progress=False)
    fields: dict[str, Any] = {"target_modules": ["l0", "l1"], "init_lora_weights": False}
    other = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**fields))
    adapted = inlay.get_peft_model(net, inlay.LoraConfig(**fields))
    assert inlay.find_kappa_target_modules(adapted, 1.0, show_progress=False) == plain
    assert any("lora_A" in name for name in theirs.find_kappa_target_modules(other, 1.0)["target_modules"])


def test_the_choice_is_a_configuration():
    net = model()
    chosen = inlay.find_kappa_target_modules(net, 0.4, show_progress=False)
    adapted = inlay.get_peft_model(net, inlay.LoraConfig(r=2, **chosen))
    assert set(adapted.targeted_module_names) == set(chosen["target_modules"] or [])


def test_progress(capsys):
    inlay.find_kappa_target_modules(model(), 0.4)
    assert "linear layers" in "".join(capsys.readouterr())
