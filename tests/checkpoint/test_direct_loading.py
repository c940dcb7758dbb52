"""A file that fits to the letter is loaded without an index of keys: the same values, and nothing else gets through."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_to_save import CASES, CONFIGS, assert_same, everything, net, shaken
from safetensors.torch import load_file, save_file
from torch import Tensor

import inlay
from inlay.checkpoint import state_dict
from inlay.checkpoint.direct import exact_pairs
from inlay.errors import CheckpointMismatchError

# Where the index is needed: keys or values that are no tensors of a layer as they stand.
INDEXED = {
    ("LORA", "copy"),
    ("LORA", "bias"),
    ("LORA", "own_bias"),
    ("LORA", "bias_and_copy"),
    *((method, case) for method, case in CASES if method in ("VERA", "TRAINABLE_TOKENS")),
}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each load so far needed no index."""
    found: list[bool] = []

    def seen(*args: Any) -> Any:
        pairs = exact_pairs(*args)
        found.append(pairs is not None)
        return pairs

    monkeypatch.setattr(state_dict, "exact_pairs", seen)
    yield found
    assert found


def saved(method: str, case: str, folder: Path) -> Path:
    """Save a trained adapter of a wrapped model."""
    model = inlay.get_peft_model(net(), CONFIGS[method][case]())
    shaken(model)
    model.save_pretrained(folder)
    return folder


def rewritten(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("method", "case"), CASES, ids=lambda part: part.lower())
def test_both_ways_give_the_same_model(
    method: str, case: str, tmp_path: Path, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(method, case, tmp_path)
    straight = inlay.PeftModel.from_pretrained(net(), folder)
    if method in ("LORA", "LOHA", "IA3"):
        assert taken == [(method, case) not in INDEXED]
    monkeypatch.setattr(state_dict, "exact_pairs", lambda *args: None)
    assert_same(everything(straight), everything(inlay.PeftModel.from_pretrained(net(), folder)))


def test_a_load_into_a_model_with_adapters(tmp_path: Path, taken: list[bool]) -> None:
    folder = saved("LORA", "kinds", tmp_path)
    model = inlay.PeftModel.from_pretrained(net(), folder, "first")
    model.load_adapter(folder, "second")
    assert taken == [True, True]
    held = everything(model)
    first = {name: tensor for name, tensor in held.items() if ".first." in name}
    assert first
    for name, tensor in first.items():
        assert torch.equal(tensor, held[name.replace(".first.", ".second.")])


def test_an_adapter_that_was_there_is_filled_by_the_index(tmp_path: Path) -> None:
    """Its layers may stand elsewhere by now."""
    folder = saved("LORA", "linear", tmp_path)
    model = inlay.PeftModel.from_pretrained(net(), folder)
    base = model.base_model.model
    base.lin, base.wide = base.wide, base.lin
    model.load_adapter(folder, "default")
    values = load_file(folder / "adapter_model.safetensors")
    for name in ("lin", "wide"):
        stands = getattr(base, name).lora_A["default"].weight
        assert torch.equal(stands, values[f"base_model.model.{name}.lora_A.weight"])


def test_layers_that_were_put_elsewhere_get_the_values_of_where_they_stand(tmp_path: Path, taken: list[bool]) -> None:
    folder = saved("LORA", "linear", tmp_path)
    model = inlay.PeftModel.from_pretrained(net(), folder, "first")
    base = model.base_model.model
    base.lin, base.wide = base.wide, base.lin
    model.load_adapter(folder, "second")
    assert taken == [True, True]
    values = load_file(folder / "adapter_model.safetensors")
    for name in ("lin", "wide"):
        stands = getattr(base, name).lora_A["second"].weight
        assert torch.equal(stands, values[f"base_model.model.{name}.lora_A.weight"])


KEY = "base_model.model.lin.lora_A.weight"
CHANGES = {
    "missing": lambda held: {key: value for key, value in held.items() if key != KEY},
    "unexpected": lambda held: {**held, KEY.replace("lin", "lni"): held[KEY].clone()},
    "shape": lambda held: {**held, KEY: torch.zeros(3, 8)},
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_does_not_fit_is_refused_as_before(change: str, tmp_path: Path, taken: list[bool]) -> None:
    folder = saved("LORA", "linear", tmp_path)
    rewritten(folder, CHANGES[change](load_file(folder / "adapter_model.safetensors")))
    model = net()
    before = everything(model)
    with pytest.raises(CheckpointMismatchError, match="lora_A"):
        inlay.PeftModel.from_pretrained(model, folder)
    assert taken == [False]
    assert_same(everything(model), before)


def test_values_are_rounded_to_the_dtype_of_the_model(tmp_path: Path, taken: list[bool]) -> None:
    folder = saved("LORA", "linear", tmp_path)
    values = load_file(folder / "adapter_model.safetensors")
    rewritten(folder, {key: value.double() for key, value in values.items()})
    model = inlay.PeftModel.from_pretrained(net(), folder)
    assert taken == [True]
    held = model.base_model.model.lin.lora_A["default"].weight
    assert held.dtype == torch.float32
    assert torch.equal(held, values[KEY])
