"""The table of peft's layer classes is that of the installed peft, and every class of it stands where peft's stands."""

from __future__ import annotations

import importlib
import inspect
import json
from importlib.resources import files
from typing import Any

import pytest
import torch
from layer_twins import CASES, OURS, get, twins
from record_layers import record
from torch import nn

from inlay.compat.layers.table import is_built, recorded
from inlay.errors import NotAvailableError

CLASSES = sorted(recorded())


def peft_class(full: str) -> Any:
    """Return a layer class of peft, or None where it needs a library that is not installed."""
    home, _, name = full.rpartition(".")
    try:
        return getattr(importlib.import_module(f"peft.{home}"), name, None)
    except ImportError:
        return None


def test_the_table_is_that_of_the_installed_peft() -> None:
    held = json.loads(files("inlay.compat.layers").joinpath("layers.json").read_text(encoding="utf-8"))
    assert held == record()


@pytest.mark.parametrize("full", CLASSES)
def test_classes_are_related_as_in_peft(full: str) -> None:
    theirs, ours = peft_class(full), get(OURS, full)
    assert ours.__name__ == full.rpartition(".")[2]
    if theirs is None:
        return
    assert issubclass(ours, nn.Module) == issubclass(theirs, nn.Module)
    for other in CLASSES:
        there = peft_class(other)
        if there is not None and issubclass(theirs, there):
            assert issubclass(ours, get(OURS, other)), other
    assert issubclass(ours, get(OURS, "tuners.tuners_utils.BaseTunerLayer"))


@pytest.mark.parametrize("full", CLASSES)
def test_weights_and_parameters_are_named_as_in_peft(full: str) -> None:
    theirs, entry = peft_class(full), recorded()[full]
    if theirs is None:
        return
    assert tuple(theirs.adapter_layer_names)[: len(entry.weights)] == entry.weights
    assert tuple(theirs.other_param_names) == entry.others
    for name, signature in (("__init__", entry.init_signature), ("update_layer", entry.update_signature)):
        there = inspect.signature(getattr(theirs, name))
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if [p.kind for p in there.parameters.values()][1:] != list(kinds):
            assert list(signature.parameters) == list(there.parameters)
            if entry.kinds:
                here = inspect.signature(getattr(get(OURS, full), name)).parameters
                assert [(p.name, p.kind) for p in here.values()] == [
                    (p.name, p.kind) for p in there.parameters.values()
                ]


@pytest.mark.parametrize("case", CASES)
def test_every_layer_is_an_instance_of_what_peft_makes_there(case: str) -> None:
    theirs, ours = twins(case)
    names = [*CLASSES, "utils.other.ModulesToSaveWrapper", "utils.other.AuxiliaryTrainingWrapper"]
    names += ["utils.other.TrainableTokensWrapper", "tuners.tuners_utils.BaseTunerLayer"]
    mine = dict(ours.named_modules())
    seen = 0
    for path, module in theirs.named_modules():
        if path not in mine:
            continue
        for full in names:
            cls = peft_class(full)
            if cls is None:
                continue
            expected = isinstance(module, cls)
            if path.endswith("token_adapter"):
                continue  # in Inlay the layer holds the rows itself
            if case == "tokens_beside" and path == "emb" and full.endswith("BaseTunerLayer"):
                continue  # there it is a wrapper around a tuner layer, here it is both
            assert isinstance(mine[path], get(OURS, full)) == expected, (path, full)
            seen += expected
    assert seen


@pytest.mark.parametrize("full", [full for full in CLASSES if not is_built(recorded()[full].peft_type)])
def test_what_is_not_built_says_so(full: str) -> None:
    cls = get(OURS, full)
    assert not isinstance(nn.Linear(2, 2), cls)
    if recorded()[full].is_module and recorded()[full].kinds:
        with pytest.raises(NotAvailableError, match="not available"):
            cls(nn.Linear(2, 2), *[None] * (len(_required(full)) - 1))
    with pytest.raises(NotImplementedError):
        raise NotAvailableError("PEFT raises that where it lacks something")


def _required(full: str) -> list[str]:
    parameters = list(recorded()[full].init_signature.parameters.values())[1:]
    positional = (p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in positional if p.default is inspect.Parameter.empty]


def test_a_class_comes_alive_with_its_method(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.core import registry
    from inlay.methods.lora import LoRA, LoraConfig

    hira = get(OURS, "tuners.hira.layer.Linear")
    monkeypatch.setitem(registry._methods, "HIRA", LoRA)
    layer = hira(nn.Linear(3, 3), "default", LoraConfig(), 2)
    assert layer(torch.ones(1, 3)).shape == (1, 3)
