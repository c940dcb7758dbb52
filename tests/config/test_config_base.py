from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Literal

import numpy as np
import peft
import pytest
from config_classes import HadamardConfig, TokensConfig

from inlay.config import (
    LayerFields,
    PeftConfig,
    PeftType,
    PromptLearningConfig,
    Settings,
    TargetFields,
    TaskType,
    setting,
    settings,
)
from inlay.errors import ConfigError, ConfigTypeError, InlayWarning, UnknownFieldError


def facts(cls):
    """Name and default of every field, in order."""
    return [
        (f.name, f.default if f.default_factory is dataclasses.MISSING else f.default_factory())
        for f in dataclasses.fields(cls)
    ]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (PeftConfig, peft.PeftConfig),
        (PromptLearningConfig, peft.PromptLearningConfig),
        (HadamardConfig, peft.LoHaConfig),
    ],
)
def test_fields_order_and_defaults_are_pefts(ours, theirs):
    beyond = [name for name in ours.__dataclass_fields__ if name in ours.beyond]
    assert facts(ours)[: len(facts(theirs))] == facts(theirs)
    assert [name for name, *_ in facts(ours)[len(facts(theirs)) :]] == beyond
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters) + beyond
    assert ours().is_prompt_learning == theirs().is_prompt_learning
    assert ours().is_adaption_prompt == theirs().is_adaption_prompt


def test_positional_arguments_mean_what_they_mean_in_peft():
    values = ("CAUSAL_LM", None, {"a": 1}, "0.1", "base", "main", True, {"q": 2}, {"q": 3}, 4, 5, 0.5)
    ours, theirs = HadamardConfig(*values), peft.LoHaConfig(*values)
    assert ours.to_dict() == theirs.to_dict()


def test_every_field_has_a_sentence_for_the_reference():
    for cls in (PeftConfig, PromptLearningConfig, HadamardConfig):
        for field in dataclasses.fields(cls):
            assert len(field.metadata["doc"]) > 3
            assert field.metadata["parameters"]


def test_the_class_fixes_the_method():
    assert HadamardConfig.peft_type is PeftType.LOHA
    assert HadamardConfig().peft_type is PeftType.LOHA
    assert HadamardConfig(peft_type="LOHA").peft_type is PeftType.LOHA
    with pytest.raises(ConfigError, match=r"HadamardConfig\.peft_type: expected 'LOHA'.*'IA3'"):
        HadamardConfig(peft_type="IA3")
    assert PeftConfig(peft_type="LORA").peft_type is PeftType.LORA
    with pytest.raises(ConfigError, match=r"'LORAX'.*'LORA'"):
        PeftConfig(peft_type="LORAX")


def test_values_are_normalised():
    config = HadamardConfig(
        task_type="CAUSAL_LM",
        target_modules=["b", "a", "a"],
        exclude_modules=("c",),
        modules_to_save={"y", "x"},
        layers_to_transform=range(3),
        r=np.int64(4),
        rank_pattern=None,
    )
    assert config.task_type is TaskType.CAUSAL_LM
    assert (config.target_modules, config.exclude_modules) == ({"a", "b"}, {"c"})
    assert (config.modules_to_save, config.layers_to_transform) == (["x", "y"], [0, 1, 2])
    assert type(config.r) is int
    assert config.rank_pattern == {}
    assert HadamardConfig(target_modules=["a", "b"]) == HadamardConfig(target_modules={"b", "a"})
    assert HadamardConfig(r=4) != HadamardConfig(r=5)


def test_lists_and_dicts_are_the_configs_own():
    pattern, saved = {"q": 2}, ["head"]
    config = HadamardConfig(rank_pattern=pattern, modules_to_save=saved)
    pattern["q"] = 9
    saved.append("x")
    assert (config.rank_pattern, config.modules_to_save) == ({"q": 2}, ["head"])
    config.to_dict()["rank_pattern"]["q"] = 9
    assert config.rank_pattern == {"q": 2}


WRONG_TYPES = [
    ({"r": "8"}, r"HadamardConfig\.r: expected int, found '8' \(str\)"),
    ({"r": True}, r"\.r: expected int, found True \(bool\)"),
    ({"r": 8.0}, r"\.r: expected int, found 8\.0 \(float\)"),
    ({"r": None}, r"\.r: expected int, found None"),
    ({"rank_dropout": "no"}, r"\.rank_dropout: expected float"),
    ({"rank_dropout": False}, r"\.rank_dropout: expected float"),
    ({"init_weights": 1}, r"\.init_weights: expected bool, found 1 \(int\)"),
    ({"target_modules": 3}, r"\.target_modules: expected list\[str\] or set\[str\] or str or None, found 3"),
    ({"target_modules": ["q", 3]}, r"\.target_modules\[1\]: expected str, found 3"),
    ({"modules_to_save": "head"}, r"\.modules_to_save: expected list\[str\] or None, found 'head'"),
    ({"layers_to_transform": [0, "1"]}, r"\.layers_to_transform\[1\]: expected int"),
    ({"layers_to_transform": True}, r"\.layers_to_transform: expected list\[int\] or int or None, found True"),
    ({"rank_pattern": [("q", 1)]}, r"\.rank_pattern: expected dict\[str, int\] or None"),
    ({"rank_pattern": {"q": "1"}}, r"\.rank_pattern\['q'\]: expected int, found '1'"),
    ({"task_type": 3}, r"\.task_type: expected .*'CAUSAL_LM'"),
    ({"inference_mode": "yes"}, r"\.inference_mode: expected bool"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_TYPES)
def test_wrong_types_are_refused_by_name(values, message):
    with pytest.raises(ConfigTypeError, match=message) as caught:
        HadamardConfig(**values)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)


WRONG_VALUES = [
    ({"r": 0}, r"\.r: expected a number greater than 0, found 0"),
    ({"rank_dropout": -0.1}, r"\.rank_dropout: expected a number at least 0"),
    ({"rank_dropout": 1}, r"\.rank_dropout: expected a number less than 1"),
    ({"rank_dropout": float("nan")}, r"\.rank_dropout: expected a finite number, found nan"),
    ({"alpha": float("inf")}, r"\.alpha: expected .*found inf"),
    ({"rank_pattern": {"q": 0}}, r"\.rank_pattern: expected a number greater than 0"),
    ({"layers_to_transform": [0, -1]}, r"\.layers_to_transform: expected a number at least 0, found -1"),
    ({"task_type": "CAUSAL"}, r"\.task_type: .*Did you mean 'CAUSAL_LM'"),
    ({"target_modules": "q_proj("}, r"\.target_modules: expected a regular expression.*q_proj\("),
    ({"exclude_modules": "["}, r"\.exclude_modules: expected a regular expression"),
    ({"rank_pattern": {"*": 1}}, r"\.rank_pattern: expected a regular expression"),
    ({"target_modules": "a" * 10_001}, r"\.target_modules: expected a pattern of at most 10000 .*found 10001"),
    ({"target_modules": ["a" * 10_001]}, r"\.target_modules: expected names of at most 10000 .*found 10001"),
    ({"target_modules": "(" * 9000 + ")" * 9000}, r"\.target_modules: expected"),
    ({"layers_pattern": "h"}, r"\.layers_pattern: expected layers_to_transform"),
    ({"layers_pattern": "h(", "layers_to_transform": 1}, r"\.layers_pattern: expected a regular expression"),
    ({"target_modules": ".*q", "layers_to_transform": 1}, r"\.layers_to_transform: expected None"),
    ({"target_modules": "all-linear", "layers_to_transform": 1}, r"\.layers_to_transform: expected None"),
]


@pytest.mark.parametrize(("values", "message"), WRONG_VALUES)
def test_wrong_values_are_refused_by_name(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        HadamardConfig(**values)
    assert not isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    "values",
    [
        {"layers_pattern": "h"},
        {"target_modules": ".*q", "layers_to_transform": 1},
        {"target_modules": "all-linear", "layers_to_transform": 1},
        {"target_modules": "all-linear"},
        {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "h"},
    ],
)
def test_choosing_layers_is_allowed_where_peft_allows_it(values):
    def refused(cls):
        try:
            cls(**values)
        except ValueError:
            return True
        return False

    # LoraConfig has the full set of rules; PEFT's LoHaConfig lacks one of them and then ignores the layers.
    assert refused(HadamardConfig) == refused(peft.LoraConfig)


def test_unknown_keywords():
    with pytest.raises(UnknownFieldError, match=r"unexpected keyword argument 'target_module'.*'target_modules'") as e:
        HadamardConfig(target_module=["q"])
    assert isinstance(e.value, TypeError)
    with pytest.raises(UnknownFieldError, match="not_saved"):
        HadamardConfig(not_saved={"r"})
    with pytest.raises(TypeError, match="positional"):
        HadamardConfig(*range(30))


def test_a_failed_validation_changes_nothing():
    config = HadamardConfig(target_modules=["q"])
    config.target_modules = ["k", "v"]
    config.r = -1
    with pytest.raises(ConfigError, match=r"\.r: expected a number greater than 0"):
        config.validate()
    assert config.target_modules == ["k", "v"]
    config.r = 2
    config.validate()
    assert config.target_modules == {"k", "v"}


def test_copies_and_repr():
    config = HadamardConfig(task_type="CAUSAL_LM", r=2, target_modules=["q"], rank_pattern={"a": 1})
    assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config) == copy.copy(config)
    assert copy.deepcopy(config).rank_pattern is not config.rank_pattern
    changed = dataclasses.replace(config, r=3)
    assert (changed.r, changed.target_modules, config.r) == (3, {"q"}, 2)
    with pytest.raises(ConfigError):
        dataclasses.replace(config, r=0)
    with pytest.raises(TypeError, match="unhashable"):
        hash(config)
    assert repr(HadamardConfig()) == "HadamardConfig()"
    assert eval(repr(config)) == config
    assert len(repr(HadamardConfig(target_modules=[f"module{i}" for i in range(500)]))) < 300


def test_a_plain_dataclass_extends_a_config_as_it_does_in_peft():
    @dataclasses.dataclass
    class Own(HadamardConfig):
        extra: int = 3

    config = Own(r=2, extra=4)
    assert [f.name for f in dataclasses.fields(Own)][:-1] == [f.name for f in dataclasses.fields(HadamardConfig)]
    assert config.to_dict()["extra"] == 4
    with pytest.raises(ConfigTypeError, match=r"Own\.extra"):
        Own(extra="4")
    with pytest.raises(UnknownFieldError, match="'extra'"):
        Own(extr=4)


def test_a_plain_dataclass_may_use_the_mix_ins():
    @dataclasses.dataclass
    class Own(TargetFields, LayerFields, PeftConfig):
        r: int = 8

    own = ["target_modules", "target_parameters", "scope", "exclude_modules", "modules_to_save"]
    own += ["layers_to_transform", "layers_pattern", "r"]
    assert [f.name for f in dataclasses.fields(Own)][7:] == own
    assert Own(target_modules=["q"]).target_modules == {"q"}
    with pytest.raises(ConfigError, match=r"Own\.layers_pattern"):
        Own(layers_pattern="h")


def test_extending_an_ordered_config_keeps_its_order():
    @settings
    class More(HadamardConfig):
        extra: int = setting(3, doc="x")

    names = [f.name for f in dataclasses.fields(More)]
    *ours, last = (f.name for f in dataclasses.fields(HadamardConfig))
    assert names == [*ours, "extra", last]
    assert last == "scope"  # which is taken by name only
    assert More.peft_type is PeftType.LOHA


def test_a_method_of_ones_own_may_have_its_own_name():
    @settings
    class Mine(PeftConfig):
        peft_type = "MINE"

    assert Mine().peft_type == "MINE"


def test_ordering_a_field_that_is_not_there():
    with pytest.raises(ConfigError, match=r"'layers_patern'.*'layers_pattern'"):

        @settings(positional="layers_patern")
        class Wrong(LayerFields, PeftConfig):
            pass


def test_an_annotation_that_cannot_be_evaluated():
    @settings
    class Wrong(PeftConfig):
        extra: Nowhere = setting(None, doc="x")  # noqa: F821

    with pytest.raises(ConfigError, match=r"Wrong.*Nowhere"):
        Wrong()


@settings
class Inner(Settings):
    bits: int = setting(4, doc="Bits.", choices=(2, 4, 8))
    made: list[str] | None = dataclasses.field(default=None, init=False)


@settings
class Outer(PeftConfig):
    inner: Inner | None = setting(None, doc="x")
    pairs: list[tuple[int, int]] | None = setting(None, doc="x")
    init: bool | Literal["gaussian", "pissa"] = setting(True, doc="x")
    even: int = setting(2, doc="x", check=lambda n: None if n % 2 == 0 else "an even number")


def test_nested_configs_pairs_literals_and_checks():
    config = Outer(inner={"bits": 8, "made": ["a"]}, pairs=[[0, 4], (2, 6)], init="pissa")
    assert config.inner.bits == 8
    assert config.inner.made == ["a"]
    assert config.pairs == [(0, 4), (2, 6)]
    assert config.to_dict()["inner"] == {"bits": 8, "made": ["a"]}
    with pytest.raises(ConfigError, match=r"Inner\.bits: expected '2' or '4' or '8', found 3"):
        Outer(inner={"bits": 3})
    with pytest.raises(UnknownFieldError, match=r"Inner has no field 'bit'.*'bits'"):
        Outer(inner={"bit": 3})
    with pytest.raises(ConfigTypeError, match=r"Outer\.inner: expected Inner or None, found 4"):
        Outer(inner=4)
    with pytest.raises(ConfigTypeError, match=r"Outer\.pairs\[0\]: expected tuple\[int, int\], found \[1\]"):
        Outer(pairs=[[1]])
    with pytest.raises(ConfigError, match=r"Outer\.init: .*found 'pisa'.*Did you mean 'pissa'") as caught:
        Outer(init="pisa")
    assert not isinstance(caught.value, ConfigTypeError)
    with pytest.raises(ConfigTypeError, match=r"Outer\.init"):
        Outer(init=1)
    with pytest.raises(ConfigError, match=r"Outer\.even: expected an even number, found 3"):
        Outer(even=3)


def test_limits_hold_for_every_number_in_a_list():
    with pytest.raises(ConfigError, match=r"TokensConfig\.token_indices: expected a number at least 0, found -2"):
        TokensConfig(token_indices=[1, -2])


def test_a_plain_value_is_the_default_of_a_shared_field():
    """Limits and words of the field stay, and so does the default that other classes have."""

    @settings
    class Sized:
        size: int = setting(default=4, doc="How many.", gt=0)
        named: list[int] | None = setting(doc="Which ones.", factory=list)

    @settings
    class OneConfig(Sized, Settings):
        size = 32
        named = None

    @settings
    class OtherConfig(Sized, Settings):
        pass

    assert (OneConfig().size, OneConfig().named, OtherConfig().size, OtherConfig().named) == (32, None, 4, [])
    assert OneConfig(size=5).size == 5
    assert {cls.__dataclass_fields__["size"].metadata["doc"] for cls in (OneConfig, OtherConfig)} == {"How many."}
    with pytest.raises(ConfigError, match=r"OneConfig\.size: expected a number greater than 0, found 0"):
        OneConfig(size=0)


def test_warnings_and_errors_of_several_fields_name_the_class_and_the_caller():
    @settings
    class BoundConfig(Settings):
        low: int = setting(default=0, doc="From.")
        high: int = setting(default=9, doc="To.")

        def check_fields(self):
            if self.low > self.high:
                raise self.wrong("low", f"expected at most high={self.high}, found {self.low}")
            if self.low == self.high:
                self.warn("low leaves one value")

    with pytest.raises(ConfigError, match=r"BoundConfig\.low: expected at most high=9, found 10"):
        BoundConfig(low=10)
    with pytest.warns(InlayWarning, match=r"BoundConfig\.low leaves one value") as caught:
        BoundConfig(low=9)
    assert caught[0].filename == __file__
