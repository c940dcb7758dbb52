"""Configuration files of 21 releases: fields that are missing, retired, null or of the future."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
from releases.folders import RELEASES, folder, root, saved_by

import inlay
from inlay.config.base import COMPATIBLE_PEFT_VERSION
from inlay.core.registry import method_types
from inlay.errors import CheckpointError, ConfigError, InlayWarning, UnknownMethodError

LAST_WITHOUT_VERSION = "0.17.1"
# What a file says of a field whose value Inlay settles while reading.
SETTLED = {"peft_version", "inference_mode"}


def files_of(release: str) -> list[Path]:
    """Return every configuration of a release: those of the cases, and those of every method with nothing set."""
    cases = [folder(release, case) for case in saved_by(release)]
    return [*cases, *sorted((root(release) / "configs").iterdir())]


@pytest.mark.parametrize("release", RELEASES)
def test_every_configuration_is_read(release, tmp_path):
    """What the file says stands in the object; what it does not say has PEFT's default."""
    read = 0
    for place in files_of(release):
        said = json.loads((place / "adapter_config.json").read_text())
        if said["peft_type"] not in method_types():
            with pytest.raises(UnknownMethodError, match=said["peft_type"]):
                inlay.PeftConfig.from_pretrained(place)
            continue
        if said["peft_type"] == "ADALORA" and said.get("total_step") is None:
            with pytest.raises(ConfigError, match="total_step"):  # as in PEFT
                inlay.PeftConfig.from_pretrained(place)
            continue
        if said["peft_type"] == "OFT" and "oft_block_size" not in said:
            with pytest.raises(CheckpointError, match=r"before 0\.14"):
                inlay.PeftConfig.from_pretrained(place)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if release not in ("0.14.0", "0.15.2"):  # two fields of OFT went after them
                warnings.filterwarnings("error", message=".*does not have these fields")
            config = inlay.PeftConfig.from_pretrained(place)
        config.save_pretrained(tmp_path)
        now = json.loads((tmp_path / "adapter_config.json").read_text())
        default = defaults(said["peft_type"])
        for key in now.keys() - SETTLED:
            wanted = default[key] if said.get(key) is None else said[key]
            found = now[key]
            if isinstance(found, list) and isinstance(wanted, list) and key.endswith("modules"):
                found, wanted = sorted(found), sorted(wanted)
            assert found == wanted, (place.name, key)
        assert config.peft_version == (said.get("peft_version") or LAST_WITHOUT_VERSION)
        read += 1
    assert read >= 12


def defaults(peft_type: str) -> dict:
    """Return what PEFT 0.21.2 would write for a configuration with nothing set."""
    needed = {"total_step": 1} if peft_type == "ADALORA" else {}
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**needed)
    return json.loads(json.dumps(config.to_dict(), default=list))


def written(tmp_path: Path, **fields: object) -> Path:
    said = json.loads((folder("0.21.2", "lora") / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, **fields}))
    return tmp_path


def test_fields_of_a_later_release_are_dropped_with_a_warning(tmp_path):
    place = written(tmp_path, peft_version="0.99.0", lora_gamma=3, use_dorra=False)
    with pytest.warns(InlayWarning, match=r"later version.*'lora_gamma'.*'use_dorra'.*'use_dora'"):
        config = inlay.PeftConfig.from_pretrained(place)
    assert (config.r, config.peft_version) == (2, "0.99.0")
    with pytest.warns(UserWarning, match="lora_gamma"):  # and so does PEFT
        peft.PeftConfig.from_pretrained(str(place))


def test_nulls_mean_the_default(tmp_path):
    """0.3 wrote them for ``lora_alpha`` and ``lora_dropout``, whose default was None."""
    names = ["lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "rank_pattern", "init_lora_weights", "use_dora"]
    config = inlay.PeftConfig.from_pretrained(written(tmp_path, **dict.fromkeys(names)))
    fresh = inlay.LoraConfig()
    assert [getattr(config, name) for name in names] == [getattr(fresh, name) for name in names]
    assert (config.r, sorted(config.target_modules)) == (2, ["lin", "wide"])
    with pytest.raises(ConfigError, match=r"\.lora_alpha"):
        inlay.LoraConfig(lora_alpha=None)


@pytest.mark.parametrize("version", ["0.18.0", "0.18.1.dev0@4f1a2b", "1.0", "unknown"])
def test_any_version_is_kept(version, tmp_path):
    assert inlay.PeftConfig.from_pretrained(written(tmp_path, peft_version=version)).peft_version == version


@pytest.mark.parametrize("said", [{"peft_version": None}, {}], ids=["null", "absent"])
def test_no_version_means_a_release_that_wrote_none(said, tmp_path):
    place = written(tmp_path, **said)
    if not said:
        values = json.loads((place / "adapter_config.json").read_text())
        del values["peft_version"]
        (place / "adapter_config.json").write_text(json.dumps(values))
    assert inlay.PeftConfig.from_pretrained(place).peft_version == LAST_WITHOUT_VERSION
    assert peft.PeftConfig.from_pretrained(str(place)).peft_version == peft.__version__
    unmarked = [release for release in RELEASES if "peft_version" not in json.loads(
        (folder(release, "lora") / "adapter_config.json").read_text())]  # fmt: skip
    assert unmarked[-1] == LAST_WITHOUT_VERSION
    assert inlay.LoraConfig().peft_version == COMPATIBLE_PEFT_VERSION
