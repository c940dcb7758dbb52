"""The classes that stand at ``base_model``, by PEFT's names."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as THEIRS
from peft.tuners.tuners_utils import BaseTuner as TheirTuner
from worlds import Net, inputs

import inlay.compat.peft as ours
from inlay.compat.peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from inlay.compat.peft.tuners.lycoris_utils import LycorisConfig, LycorisTuner
from inlay.compat.peft.tuners.tuners_utils import BaseTuner
from inlay.core.registry import method_types
from inlay.errors import NotAvailableError

TUNERS = {str(key.value): cls for key, cls in THEIRS.items() if issubclass(cls, TheirTuner)}
BUILT = sorted(set(method_types()) & TUNERS.keys())


@pytest.mark.parametrize("method", BUILT)
def test_each_method_has_its_class(method):
    theirs = TUNERS[method]
    cls = getattr(ours, theirs.__name__)
    assert cls is PEFT_TYPE_TO_TUNER_MAPPING[method]
    assert issubclass(cls, BaseTuner)
    assert cls.__name__ == theirs.__name__
    assert cls.__module__.endswith(theirs.__module__.removeprefix("peft."))
    assert cls.prefix == theirs.prefix
    assert cls.tuner_layer_cls.__name__ == theirs.tuner_layer_cls.__name__
    assert pickle.loads(pickle.dumps(cls)) is cls
    held = getattr(theirs, "target_module_mapping", None)
    if held:
        normal = {family: found if isinstance(found, str) else set(found) for family, found in held.items()}
        mine = cls.target_module_mapping
        assert {family: found if isinstance(found, str) else set(found) for family, found in mine.items()} == normal


@pytest.mark.parametrize("method", sorted(TUNERS.keys() - set(method_types())))
def test_methods_that_are_not_built_have_a_name_only(method):
    cls = getattr(ours, TUNERS[method].__name__)
    assert not isinstance(ours.get_peft_model(Net(), ours.LoraConfig(target_modules=["first"])).base_model, cls)
    with pytest.raises(NotAvailableError):
        cls(Net(), None, "default")


@pytest.mark.parametrize("name", sorted(name for name in vars(TheirTuner) if not name.startswith("__")))
def test_base_tuner_has_every_member(name):
    if name != "_abc_impl":
        assert hasattr(BaseTuner, name)


def test_wrappers_use_the_class_of_the_method():
    model = ours.get_peft_model(Net(), ours.LoraConfig(target_modules=["first"]))
    assert type(model.base_model) is ours.LoraModel
    assert isinstance(model.base_model, BaseTuner)
    assert not isinstance(model.base_model, ours.IA3Model)
    assert model.get_model_status().adapter_model_type == "LoraModel"
    loaded = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(loaded(inputs()), model(inputs()))


def test_a_tuner_is_constructed_by_itself():
    tuner = ours.LoraModel(Net(), {"mine": ours.LoraConfig(target_modules=["first"], r=2)}, "mine")
    assert list(tuner.peft_config) == ["mine"]
    assert tuner.active_adapter == "mine"
    assert tuner.targeted_module_names == ["first"]
    torch.testing.assert_close(tuner(inputs()), Net()(inputs()))


def test_lycoris_names():
    assert isinstance(ours.LoHaConfig(), LycorisConfig)
    assert issubclass(ours.LoHaConfig, LycorisConfig)
    assert not isinstance(ours.LoraConfig(), LycorisConfig)
    assert issubclass(ours.LoHaModel, LycorisTuner)
    assert LycorisConfig(rank_pattern={"a": 2}).rank_pattern == {"a": 2}


def test_mixed_models():
    from inlay.compat.peft.tuners.mixed.model import MixedModel

    model = ours.get_peft_model(Net(), ours.LoraConfig(target_modules=["first"]), mixed=True)
    assert type(model.base_model) is MixedModel
    assert isinstance(model.base_model, BaseTuner)
    assert not isinstance(model.base_model, ours.LoraModel)


def test_a_wrapper_from_before_is_an_instance_too():
    program = """
import torch, inlay
model = inlay.get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), inlay.LoraConfig(target_modules=["0"]))
print(type(model.base_model).__name__)
import inlay.compat.peft as peft
from inlay.compat.peft.tuners.tuners_utils import BaseTuner
print(isinstance(model.base_model, peft.LoraModel), isinstance(model.base_model, peft.IA3Model))
print(isinstance(model.base_model, BaseTuner), isinstance(model, BaseTuner))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["AdapterModel", "True", "False", "True", "False"]
