"""Saving and reading adapter_config.json, beside PEFT doing the same."""

from __future__ import annotations

import json
import os
import warnings

import peft
import pytest
from config_classes import HadamardConfig, TokensConfig
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from inlay.config import CONFIG_NAME, PeftConfig, PeftType, SavedModulesField, Settings, setting, settings
from inlay.core import registry
from inlay.errors import (
    CheckpointError,
    CheckpointMissingError,
    ConfigError,
    ConfigTypeError,
    InlayWarning,
    UnknownFieldError,
)

VALUES = {
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "base",
    "r": 4,
    "alpha": 3,
    "target_modules": ["v", "a", "q"],
    "exclude_modules": "a.*",
    "modules_to_save": ["score"],
    "rank_pattern": {"q": 2},
    "layers_to_transform": [0, 2],
    "layers_pattern": "h",
}


def write(folder, content) -> str:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("values", [{}, VALUES])
def test_the_file_is_pefts_to_the_byte(tmp_path, values):
    HadamardConfig(**values).save_pretrained(tmp_path / "ours")
    peft.LoHaConfig(**values).save_pretrained(tmp_path / "theirs")
    ours = (tmp_path / "ours" / CONFIG_NAME).read_text()
    theirs = json.loads((tmp_path / "theirs" / CONFIG_NAME).read_text())
    if theirs["target_modules"]:
        theirs["target_modules"].sort()  # PEFT writes a set in whatever order it has
    assert ours == json.dumps(theirs, indent=2, sort_keys=True)


def test_peft_reads_ours_and_we_read_pefts(tmp_path):
    ours, theirs = HadamardConfig(**VALUES), peft.LoHaConfig(**VALUES)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert peft.PeftConfig.from_pretrained(tmp_path / "ours") == theirs
        assert PeftConfig.from_pretrained(tmp_path / "theirs") == ours
        assert HadamardConfig.from_pretrained(tmp_path, subfolder="theirs") == ours


def test_auto_mapping_on_saving(tmp_path):
    config = HadamardConfig()
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "Net"})
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["auto_mapping"] == {"base_model_class": "Net"}
    assert config.auto_mapping is None
    with pytest.raises(UnknownFieldError, match="'auto_maping'"):
        config.save_pretrained(tmp_path, auto_maping={})


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    HadamardConfig(r=2).save_pretrained(tmp_path)
    before = (tmp_path / CONFIG_NAME).read_text()
    with pytest.raises(ConfigError, match=r"HadamardConfig\.auto_mapping: expected a value that JSON can hold"):
        HadamardConfig(auto_mapping={"a": object()}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"HadamardConfig\.auto_mapping"):
        HadamardConfig(auto_mapping={"a": float("nan")}).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        HadamardConfig(r=4).save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == [CONFIG_NAME]
    assert (tmp_path / CONFIG_NAME).read_text() == before


def test_saving_onto_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="found the file"):
        HadamardConfig().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_unknown_fields_in_a_file_are_one_warning(tmp_path):
    folder = write(tmp_path, {"peft_type": "LOHA", "r": 4, "target_module": ["q"], "future": 1})
    with pytest.warns(InlayWarning) as caught:
        config = PeftConfig.from_pretrained(folder)
    assert (len(caught), config.r) == (1, 4)
    text = str(caught[0].message)
    assert CONFIG_NAME in text
    assert "'target_module'. Did you mean 'target_modules'" in text
    assert "'future'" in text
    with pytest.warns(UserWarning, match="future"):
        assert peft.PeftConfig.from_pretrained(folder).r == 4


def test_runtime_fields_in_a_file_are_ignored_as_in_peft(tmp_path):
    folder = write(tmp_path, {"peft_type": "LOHA", "runtime_config": {"x": 1}})
    with pytest.warns(InlayWarning, match="runtime_config"):
        ours = PeftConfig.from_json_file(f"{folder}/{CONFIG_NAME}")
    with pytest.warns(UserWarning, match="runtime_config"):
        assert ours == peft.PeftConfig.from_json_file(f"{folder}/{CONFIG_NAME}")


@settings
class Part(Settings):
    bits: int = setting(4, doc="x")


@settings
class NestedConfig(SavedModulesField, PeftConfig):
    peft_type = PeftType.LOKR
    not_saved = PeftConfig.not_saved | {"cache"}

    part: Part | None = setting(None, doc="x")
    pairs: list[tuple[int, int]] | None = setting(None, doc="x")
    cache: str | None = setting(None, doc="x")


def test_nested_configs_in_files(tmp_path, monkeypatch):
    monkeypatch.setitem(registry._methods, "LOKR", type("Method", (), {"config_class": NestedConfig}))
    config = NestedConfig(part=Part(bits=2), pairs=[(0, 4)], cache="here")
    config.save_pretrained(tmp_path)
    found = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (found["part"], found["pairs"], "cache" in found) == ({"bits": 2}, [[0, 4]], False)
    back = PeftConfig.from_pretrained(tmp_path)
    assert (back.part, back.pairs, back.cache) == (Part(bits=2), [(0, 4)], None)
    with pytest.warns(InlayWarning, match=r"'part\.bit'\. Did you mean 'bits'"):
        back = PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "LOKR", "part": {"bit": 3}}))
    assert back.part == Part()
    with pytest.raises(ConfigTypeError, match=rf"{CONFIG_NAME}: Part\.bits: expected int, found '3'"):
        PeftConfig.from_pretrained(write(tmp_path, {"peft_type": "LOKR", "part": {"bits": "3"}}))


BAD_FILES = [
    ("{", CheckpointError, "cannot be read"),
    ("", CheckpointError, "cannot be read"),
    ("[]", CheckpointError, "expected a JSON object, found list"),
    ('{"peft_type": "LOHA", "r": 1, "r": 2}', CheckpointError, "'r' stands twice"),
    ('{"peft_type": "LOHA", "alpha": NaN}', CheckpointError, "NaN is not a JSON number"),
    ("[" * 200_000, CheckpointError, "cannot be read"),
    ("{}", CheckpointError, "'peft_type'.*no such key"),
    ('{"r": 4}', CheckpointError, "'peft_type'.*no such key"),
    ('{"peft_type": null}', CheckpointError, "'peft_type'.*found None"),
    ('{"peft_type": 3}', CheckpointError, "'peft_type'.*found 3"),
    ('{"peft_type": "LOHAA"}', ConfigError, "peft_type: .*'LOHAA'.*'LOHA'"),
    ('{"peft_type": "XLORA"}', ConfigError, "peft_type: 'XLORA' is a method of PEFT that is not available"),
    ('{"peft_type": "LOHA", "r": "4"}', ConfigTypeError, r"HadamardConfig\.r: expected int, found '4'"),
    ('{"peft_type": "LOHA", "r": -4}', ConfigError, r"HadamardConfig\.r: expected a number greater than 0"),
    ('{"peft_type": "LOHA", "target_modules": "(a"}', ConfigError, r"\.target_modules: expected a regular"),
    ('{"peft_type": "LOHA", "task_type": "X"}', ConfigError, r"\.task_type: expected"),
]


@pytest.mark.parametrize(("text", "error", "message"), BAD_FILES)
@pytest.mark.parametrize("cls", [PeftConfig, HadamardConfig])
def test_bad_files_are_refused_by_name(tmp_path, cls, text, error, message):
    with pytest.raises(error, match=message) as caught:
        cls.from_pretrained(write(tmp_path, text))
    assert str(tmp_path / CONFIG_NAME) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / CONFIG_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read"):
        PeftConfig.from_pretrained(tmp_path)


def test_a_file_of_another_method(tmp_path):
    HadamardConfig(r=3).save_pretrained(tmp_path)
    with pytest.warns(InlayWarning, match="HadamardConfig is returned, not TokensConfig"):
        config = TokensConfig.from_pretrained(tmp_path)
    assert config == HadamardConfig(r=3)
    assert type(peft.TrainableTokensConfig.from_pretrained(tmp_path)) is peft.LoHaConfig


def test_keywords_fill_gaps_and_override_nothing(tmp_path):
    folder = write(tmp_path, {"peft_type": "LOHA", "r": 4})
    with pytest.warns(InlayWarning, match=r"\['bogus', 'r'\]"):
        config = HadamardConfig.from_pretrained(folder, r=7, alpha=2, bogus=1, revision="abc")
    theirs = peft.LoHaConfig.from_pretrained(folder, r=7, init_weights=False, bogus=1, revision="abc")
    assert (config.r, config.revision) == (theirs.r, theirs.revision) == (4, None)
    assert config.alpha == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HadamardConfig.from_pretrained(folder, r=4, init_weights=False).init_weights is theirs.init_weights


def test_no_file(tmp_path):
    with pytest.raises(CheckpointMissingError, match=CONFIG_NAME) as caught:
        PeftConfig.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, (ValueError, FileNotFoundError))


def test_from_peft_type():
    config = PeftConfig.from_peft_type(peft_type="LOHA", r=3)
    assert config == HadamardConfig(r=3) == HadamardConfig.from_peft_type(r=3)
    with pytest.warns(InlayWarning, match="'rr'"):
        assert PeftConfig.from_peft_type(peft_type="LOHA", rr=3) == HadamardConfig()
    with pytest.raises(UnknownFieldError, match="'rr'"):
        HadamardConfig.from_peft_type(rr=3)
    with pytest.raises(ConfigError, match="'LOHAA'"):
        PeftConfig.from_peft_type(peft_type="LOHAA")


def test_a_method_may_change_what_was_read(tmp_path, monkeypatch):
    monkeypatch.setattr(HadamardConfig, "check_kwargs", classmethod(lambda cls, **kwargs: {**kwargs, "r": 11}))
    HadamardConfig(r=3).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).r == 11


names = st.text("abcdef_.", min_size=1, max_size=8).filter(lambda name: "." not in (name[0], name[-1]))
numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
layers = st.none() | st.integers(0, 99) | st.lists(st.integers(0, 99), max_size=4)
config_values = st.fixed_dictionaries(
    {},
    optional={
        "task_type": st.sampled_from(list(peft.TaskType)).map(lambda task: task.value),
        "auto_mapping": st.none() | st.dictionaries(st.text(), st.text() | st.integers() | st.none()),
        "peft_version": st.text(min_size=1),
        "base_model_name_or_path": st.none() | st.text(),
        "inference_mode": st.booleans(),
        "r": st.integers(1),
        "alpha": numbers,
        "rank_dropout": st.floats(0, 1, exclude_max=True),
        "init_weights": st.booleans(),
        "rank_pattern": st.dictionaries(names, st.integers(1)),
        "alpha_pattern": st.none() | st.dictionaries(names, numbers),
        "exclude_modules": st.none() | names | st.lists(names),
        "target_modules": st.none() | st.lists(names),
        "modules_to_save": st.none() | st.lists(st.text()),
        "layers_to_transform": layers,
    },
)


@settings_of_hypothesis(deadline=None, max_examples=60)
@given(config_values)
def test_json_round_trip(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("round")
    config = HadamardConfig(**values)
    config.save_pretrained(folder)
    back = PeftConfig.from_pretrained(folder)
    assert back == config
    assert back.to_json() == config.to_json()
    assert peft.PeftConfig.from_pretrained(folder).to_dict() == config.to_dict()
