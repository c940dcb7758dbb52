"""Corners where code counts on what PEFT does: a cell run twice, nested blocks, refusals. Both sides."""

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


class Nested(nn.Module):
    """Blocks inside blocks, both called ``layers``."""

    def __init__(self) -> None:
        super().__init__()
        inner = [nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})]) for _ in range(2)]
        outer = nn.ModuleList([nn.ModuleDict({"layers": blocks}) for blocks in inner])
        self.model = nn.ModuleDict({"layers": outer})
        self.head = nn.Linear(4, 4)


def test_the_outer_number_counts_in_nested_blocks():
    found = []
    for side in (peft, own):
        fields = {"target_modules": ["up"], "layers_to_transform": [1], "layers_pattern": ["layers"]}
        model = side.get_peft_model(Nested(), config(side, **fields))
        found.append(sorted(name for name, _ in model.named_parameters() if "lora_A" in name))
    assert found[0] == found[1] == ["base_model.model.model.layers.1.layers.0.up.lora_A.default.weight"]


class Mixer(nn.Module):
    """Looks like a model of the Mamba family."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"model_type": "mamba"}
        self.in_proj, self.out_proj = nn.Linear(4, 4), nn.Linear(4, 4)


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config"])
def test_layers_that_fused_kernels_read_are_refused(method):
    class Config(dict):
        model_type = "mamba"

    for side in (peft, own, inlay):
        model = Mixer()
        model.config = Config(model_type="mamba")
        fields = {"target_modules": ["out_proj"]} | ({"feedforward_modules": []} if method == "IA3Config" else {})
        if side is peft and method == "IA3Config":
            side.get_peft_model(model, getattr(side, method)(**fields))  # goes in, and does nothing on a GPU
            continue
        with pytest.raises(ValueError, match="out_proj"):
            side.get_peft_model(model, getattr(side, method)(**fields))


@pytest.mark.parametrize("side", [peft, own], ids=["peft", "inlay"])
def test_lists_of_modules_cannot_be_saved_in_full(side):
    model = Nested()
    with pytest.raises(TypeError, match="ModuleList"):
        side.get_peft_model(model, config(side, target_modules=["head"], modules_to_save=["layers"]))


@pytest.mark.parametrize("side", [peft, own], ids=["peft", "inlay"])
def test_deleting_several_of_which_one_is_merged_deletes_none(side):
    model = side.get_peft_model(base(), config(side), "a", mixed=True)
    model.add_adapter("b", config(side))
    model.set_adapter(["b"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="b"):
        model.delete_adapter(["a", "b"])
    assert set(model.peft_config) == {"a", "b"}
