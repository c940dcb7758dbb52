"""Every installed method's configuration beside PEFT's of the same name."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from inlay.config import COMPATIBLE_PEFT_VERSION, CONFIG_NAME, PeftConfig
from inlay.core import registry


@pytest.fixture(autouse=True)
def known_methods():
    """The real registry, instead of the one that stands in for it in the other files here."""


def both(peft_type):
    return registry.config_class(peft_type), PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]


def plain(value):
    return vars(value) if dataclasses.is_dataclass(value) else value


NEEDED = {"ADALORA": {"total_step": 100}}  # without it, neither makes a config


ours_and_theirs = pytest.mark.parametrize("peft_type", registry.method_types())


@ours_and_theirs
def test_fields_order_and_defaults(peft_type):
    ours, theirs = both(peft_type)
    beyond = [f.name for f in dataclasses.fields(ours) if f.name in ours.beyond]  # come last, and are unset
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)] + beyond
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters) + beyond
    needed = NEEDED.get(peft_type, {})
    one, other = ours(**needed), theirs(**needed)
    assert all(getattr(one, name) is None for name in beyond)
    for field in dataclasses.fields(theirs):
        assert plain(getattr(one, field.name)) == plain(getattr(other, field.name)), field.name
    assert one.peft_type == ours.peft_type == other.peft_type
    assert one.is_prompt_learning == other.is_prompt_learning


@ours_and_theirs
def test_files(peft_type, tmp_path):
    ours, theirs = both(peft_type)
    needed = NEEDED.get(peft_type, {})
    ours(**needed).save_pretrained(tmp_path / "ours")
    theirs(**needed).save_pretrained(tmp_path / "theirs")
    written = [json.loads((tmp_path / who / CONFIG_NAME).read_text()) for who in ("ours", "theirs")]
    assert written[0] == written[1]
    assert written[0]["peft_version"] == COMPATIBLE_PEFT_VERSION
    assert PeftConfig.from_pretrained(tmp_path / "theirs") == ours(**needed)


@ours_and_theirs
def test_every_field_is_documented(peft_type):
    ours, _ = both(peft_type)
    assert ours.__name__ == PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].__name__
    assert importlib.import_module(ours.__module__).__name__.startswith("inlay.")
    for field in dataclasses.fields(ours):
        assert field.metadata.get("doc", "").strip(), field.name
        assert field.metadata.get("parameters", "").strip(), field.name
