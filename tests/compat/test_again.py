"""Running a cell twice: wrapping what is wrapped, and taking an adapter's name again. Both sides."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import inlay
import inlay.compat.peft as own
from inlay.errors import AdapterNameError, StateError

WORDS = "already|second time|multiple"  # each side says it in its own words


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))


def config(side, **changes):
    return side.LoraConfig(**({"target_modules": ["0"], "r": 2, "init_lora_weights": False} | changes))


@pytest.mark.parametrize("side", [peft, own], ids=["peft", "inlay"])
def test_the_same_name_again(side):
    model = base()
    original = model[0]
    side.get_peft_model(model, config(side))
    with pytest.warns(UserWarning, match=WORDS):
        again = side.get_peft_model(model, config(side, r=3))
    assert model[0].lora_A["default"].weight.shape == (3, 4)
    assert again.peft_config["default"].r == 3
    assert again.active_adapters == ["default"]
    assert sum("lora_" in name for name, _ in again.named_parameters()) == 2
    assert again.unload()[0] is original


@pytest.mark.parametrize("side", [peft, own], ids=["peft", "inlay"])
def test_a_wrapper_again(side):
    first = side.get_peft_model(base(), config(side))
    with pytest.warns(UserWarning, match=WORDS):
        second = side.get_peft_model(first, config(side), "other")
    assert second(torch.randn(2, 4)).shape == (2, 3)
    assert "other" in second.peft_config


@pytest.mark.parametrize("side", [peft, own], ids=["peft", "inlay"])
def test_the_same_name_again_without_a_wrapper(side):
    model = base()
    side.inject_adapter_in_model(config(side), model)
    with pytest.warns(UserWarning, match=WORDS):
        side.inject_adapter_in_model(config(side, r=3), model)
    assert model[0].lora_A["default"].weight.shape == (3, 4)


def test_what_could_not_be_replaced_stays():
    model = base()
    own.get_peft_model(model, config(own))
    x = torch.randn(2, 4)
    before = model(x)
    tensors = copy.deepcopy(model.state_dict())
    warnings.simplefilter("ignore")
    with pytest.raises(ValueError, match="nothing"):
        own.get_peft_model(model, config(own, target_modules=["nothing"]))
    assert torch.equal(model(x), before)
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


def test_inlay_itself_refuses_both():
    model = base()
    first = inlay.get_peft_model(model, config(inlay))
    with pytest.raises(AdapterNameError, match="already an adapter 'default'"):
        inlay.get_peft_model(model, config(inlay))
    with pytest.raises(StateError, match="PeftModel already"):
        inlay.get_peft_model(first, config(inlay), "other")
