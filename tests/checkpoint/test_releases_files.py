"""Files as other tools leave them: shards, pickles that do more than hold tensors, keys of other styles."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from releases.bases import base, logits
from releases.folders import RELEASES, answers, folder
from safetensors.torch import load_file, save_file
from test_releases import close
from torch import Tensor

import inlay
from inlay.checkpoint import load_peft_weights
from inlay.errors import CheckpointError, CheckpointMissingError

WEIGHTS = "adapter_model.safetensors"
CASE = "lora_head"


def tensors() -> dict[str, Tensor]:
    return load_file(folder("0.21.2", CASE) / WEIGHTS)


def written(place: Path, values: dict[str, Tensor], name: str = WEIGHTS) -> Path:
    """Put tensors beside the configuration of the case."""
    place.mkdir(exist_ok=True)
    shutil.copy(folder("0.21.2", CASE) / "adapter_config.json", place)
    if name.endswith(".bin"):
        torch.save(values, place / name)
    else:
        save_file(values, place / name)
    return place


def split(place: Path, ending: str, index: str) -> Path:
    """Put the tensors into two files with an index."""
    items = sorted(tensors().items())
    weights: dict[str, str] = {}
    for number, part in enumerate((items[:2], items[2:]), start=1):
        name = f"adapter_model-0000{number}-of-00002.{ending}"
        written(place, dict(part), name)
        weights |= dict.fromkeys(dict(part), name)
    (place / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    return place


@pytest.mark.parametrize(
    ("ending", "index"),
    [
        ("safetensors", "model.safetensors.index.json"),
        ("safetensors", "adapter_model.safetensors.index.json"),
        ("bin", "adapter_model.bin.index.json"),
        ("bin", "pytorch_model.bin.index.json"),
    ],
)
def test_shards(ending, index, tmp_path):
    model = inlay.PeftModel.from_pretrained(base("net"), split(tmp_path, ending, index))
    close(logits(model), answers("0.21.2")[CASE])


def test_shards_in_a_sub_folder(tmp_path):
    split(tmp_path / "second", "safetensors", "model.safetensors.index.json")
    model = inlay.PeftModel.from_pretrained(base("net"), tmp_path, subfolder="second")
    close(logits(model), answers("0.21.2")[CASE])


def test_shards_that_transformers_wrote(tmp_path):
    """No release of PEFT writes or reads them; ``save_pretrained`` of a transformers model with adapters does."""
    peft = pytest.importorskip("peft")
    model = base("llama")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.eval().save_pretrained(tmp_path, max_shard_size=500)
    assert not (tmp_path / WEIGHTS).exists()
    assert len(list(tmp_path.glob("adapter_model-*.safetensors"))) > 1
    read = inlay.PeftModel.from_pretrained(base("llama"), tmp_path)
    close(logits(read), logits(model))
    assert (logits(model) - logits(base("llama"))).abs().max() > 1e-3
    with pytest.raises(ValueError):
        peft.PeftModel.from_pretrained(base("llama"), str(tmp_path))


def test_a_missing_shard(tmp_path):
    place = split(tmp_path, "safetensors", "model.safetensors.index.json")
    (place / "adapter_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointMissingError, match="adapter_model-00002"):
        inlay.PeftModel.from_pretrained(base("net"), place)


def test_a_shard_without_its_tensor(tmp_path):
    place = split(tmp_path, "safetensors", "model.safetensors.index.json")
    save_file({"other": torch.zeros(1)}, place / "adapter_model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="the index says"):
        inlay.PeftModel.from_pretrained(base("net"), place)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "adapter_model.py"])
def test_an_index_that_leads_elsewhere(name, tmp_path):
    place = split(tmp_path, "safetensors", "model.safetensors.index.json")
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="beside it"):
        inlay.PeftModel.from_pretrained(base("net"), place)


def test_the_index_of_a_base_model_is_not_the_adapters(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lin.weight": "model-00001-of-00001.safetensors"}})
    )
    with pytest.raises(CheckpointMissingError, match=WEIGHTS):
        load_peft_weights(tmp_path)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("shards", [False, True], ids=["one", "shards"])
def test_bin_files_run_nothing(legacy, shards, tmp_path):
    place = written(tmp_path, {}, "adapter_model.bin")
    mark = tmp_path / "ran"
    name = "adapter_model.bin"
    if shards:
        (place / name).unlink()
        name = "adapter_model-00001-of-00001.bin"
        (place / "adapter_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    torch.save({"a": Payload(mark)}, place / name, _use_new_zipfile_serialization=not legacy)
    model = base("net")
    with pytest.raises(CheckpointError, match="cannot be read"):
        inlay.PeftModel.from_pretrained(model, place)
    assert not mark.exists()
    torch.load(place / name, weights_only=False)
    assert mark.exists()  # the file does harm where it is let
    close(logits(model), logits(base("net")))


@pytest.mark.parametrize("release", RELEASES)
def test_bin_files_of_every_release_hold_tensors_only(release):
    place = folder(release, "lora_bin" if release != "0.3.0" else "lora")
    assert (place / "adapter_model.bin").is_file()
    torch.load(place / "adapter_model.bin", weights_only=True)
    close(logits(inlay.PeftModel.from_pretrained(base("net"), place)), answers(release)["lora"])


def wide(key: str) -> str:
    """The adapter's name inside, as a state dict has it."""
    return key.replace(".weight", ".default.weight") if "lora_" in key else key


STYLES = {
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "adapter's name": wide,
    "adapter's name, no prefix": lambda key: wide(key).removeprefix("base_model.model."),
    "modules_to_save": lambda key: key.replace("head.", "head.modules_to_save."),
    "modules_to_save and name": lambda key: wide(key).replace("head.", "head.modules_to_save.default."),
    "compiled outside": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "compiled layer": lambda key: key.replace(".lin.", ".lin._orig_mod."),
    "FSDP": lambda key: key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module."),
    "checkpointed block": lambda key: key.replace(".lin.", ".lin._checkpoint_wrapped_module."),
    "DDP outside": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace("base_model.model.", "base_model.model.module."),
    "DDP and compiled": lambda key: f"module._orig_mod.{wide(key)}",
}


@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_styles_of_keys(style, name, tmp_path):
    values = {style(key): value for key, value in tensors().items()}
    assert values.keys() != tensors().keys()
    place = written(tmp_path, values, name)
    close(logits(inlay.PeftModel.from_pretrained(base("net"), place)), answers("0.21.2")[CASE])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, tmp_path):
    place = written(tmp_path, {key: value.to(dtype) for key, value in tensors().items()})
    expected = {key: value.to(dtype).float() for key, value in tensors().items()}
    model = inlay.PeftModel.from_pretrained(base("net"), place)
    found = inlay.get_peft_model_state_dict(model)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_two_keys_for_one_tensor_are_refused(tmp_path):
    values = tensors()
    key = "base_model.model.lin.lora_A.weight"
    place = written(tmp_path, {**values, f"module.{key}": values[key] + 1})
    with pytest.raises(CheckpointError, match=r"module\.base_model"):
        inlay.PeftModel.from_pretrained(base("net"), place)
