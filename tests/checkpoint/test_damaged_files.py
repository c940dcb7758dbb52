"""Files that are missing, cut off, damaged or dangerous: one error that names the file."""

from __future__ import annotations

import json

import pytest
import torch
from models_to_save import CONFIGS, adapted, net

from inlay.checkpoint import load_adapter_files, load_all, load_peft_weights, save_adapters
from inlay.errors import CheckpointError, CheckpointMissingError

CASE = CONFIGS["LORA"]["copy"]


@pytest.fixture
def folder(tmp_path):
    model, _ = adapted(CASE())
    save_adapters(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "empty"),
        (b"\x00" * 40, "zeros"),
        (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "header too large"),
        (b"not a file of tensors at all", "text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_damaged_weights(folder, content, what, name):
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_peft_weights(folder)


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("safe", [True, False])
def test_cut_off_weights(tmp_path, part, safe):
    model, _ = adapted(CASE())
    save_adapters(model, tmp_path, safe_serialization=safe)
    path = tmp_path / ("adapter_model.safetensors" if safe else "adapter_model.bin")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    with pytest.raises(CheckpointError, match=path.name):
        load_peft_weights(tmp_path)


def test_pickles_run_no_code(tmp_path):
    """A ``.bin`` file that would run a function is refused, and the function is not run."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"lin.lora_A.weight": Evil()}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        load_peft_weights(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(1)], {"a": 1}, {1: torch.ones(1)}])
def test_pickles_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="expected a dict of tensors"):
        load_peft_weights(tmp_path)


def test_missing_files(folder, tmp_path_factory):
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointMissingError, match="adapter_config"):
        load_adapter_files(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model"):
        load_peft_weights(folder)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(CheckpointMissingError, match="expected adapters"):
        load_all(net(), empty)


def test_damaged_config(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_adapter_files(folder)
    path.write_text(json.dumps({"peft_type": "LORRA"}))
    with pytest.raises(ValueError, match="LORRA"):
        load_all(net(), folder)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [({"(": "x"}, "not a regular expression"), ({r"lora_[AB]": "lora_A"}, "two keys become")],
)
def test_bad_key_mapping(folder, mapping, message):
    with pytest.raises(CheckpointError, match=message):
        load_peft_weights(folder, key_mapping=mapping)
