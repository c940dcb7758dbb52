"""Law L4, first half: what is saved and loaded is equal, tensor by tensor and in its outputs."""

from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from models_to_save import CASES, CONFIGS, Net, adapted, assert_same, everything, net, shaken, tokens
from safetensors import safe_open
from torch import nn

from inlay.checkpoint import (
    adapter_slots,
    adapter_tensors,
    get_peft_model_state_dict,
    load_adapter_files,
    load_all,
    load_peft_weights,
    save_adapters,
    set_peft_model_state_dict,
)
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.registry import BUILTIN_METHODS, config_class
from inlay.core.state import find_state


def test_every_method_is_in_the_table():
    assert sorted(CONFIGS) == sorted(BUILTIN_METHODS)


def original(model):
    """The model's tensors as they are without adapters."""
    plain = copy.deepcopy(model)
    eject(plain, find_state(plain))
    return everything(plain)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(("method", "case"), CASES, ids=lambda part: part.lower())
def test_save_then_load(method, case, safe, tmp_path):
    model, _ = adapted(CONFIGS[method][case](), "trained")
    shaken(model, "trained")
    before = adapter_tensors(model, "trained")
    assert before
    save_adapters(model, tmp_path, safe_serialization=safe)
    files = {path.name for path in (tmp_path / "trained").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors" if safe else "adapter_model.bin"}

    again = net()
    load_all(again, tmp_path)
    assert_same(adapter_tensors(again, "trained"), before)
    torch.testing.assert_close(again(tokens()), model(tokens()), rtol=0, atol=0)
    assert not torch.allclose(again(tokens()), net()(tokens()), atol=1e-4)
    assert_same(original(again), everything(net()))


@pytest.mark.parametrize(("method", "case"), CASES, ids=lambda part: part.lower())
@pytest.mark.parametrize("low_memory", [False, True], ids=["in_place", "assigned"])
def test_dict_into_another_name(method, case, low_memory):
    model, _ = adapted(CONFIGS[method][case](), "default")
    shaken(model)
    values = get_peft_model_state_dict(model)
    given = dict(values)
    again, _ = adapted(CONFIGS[method][case](), "another", low_memory=low_memory)
    flags = {key: target.tensor.requires_grad for key, target in adapter_slots(again, "another").items()}
    held = {key: target.tensor for key, target in adapter_slots(again, "another").items()}
    result = set_peft_model_state_dict(again, given, "another", low_cpu_mem_usage=low_memory)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert given.keys() == values.keys()
    assert all(given[key] is values[key] for key in values)
    assert_same(get_peft_model_state_dict(again, adapter_name="another"), values)
    torch.testing.assert_close(again(tokens()), model(tokens()), rtol=0, atol=0)
    for key, target in adapter_slots(again, "another").items():
        assert target.tensor.requires_grad == flags[key], key
        assert type(target.tensor) is type(held[key]), key
        assert (target.tensor is held[key]) != held[key].is_meta, key  # optimisers keep what was real
        assert target.tensor.data_ptr() != values[key].data_ptr(), key  # the caller's dict stays the caller's
    assert not any(tensor.is_meta for tensor in everything(again).values())


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64])
def test_values_take_the_dtype_of_the_adapter(base):
    """The rule for half precision was applied when the adapter was made; loading keeps to it."""
    model, _ = adapted(CONFIGS["LORA"]["linear"]())
    shaken(model)
    values = get_peft_model_state_dict(model)
    for low_memory in (False, True):
        again, _ = adapted(CONFIGS["LORA"]["linear"](), model=net().to(base), low_memory=low_memory)
        set_peft_model_state_dict(again, {key: value.double() for key, value in values.items()})
        expected = torch.float64 if base == torch.float64 else torch.float32
        found = get_peft_model_state_dict(again)
        assert {tensor.dtype for tensor in found.values()} == {expected}
        assert_same({key: tensor.float() for key, tensor in found.items()}, values)


def test_file_and_config(tmp_path):
    model, state = adapted(config_class("LORA")(r=2, target_modules="all-linear"))
    config = state.records["default"].config
    before = config.to_dict()
    save_adapters(model, tmp_path)
    assert config.to_dict() == before
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert not any("default" in key for key in file.keys())  # noqa: SIM118
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["inference_mode"] is True
    assert written["auto_mapping"] == {"base_model_class": "Net", "parent_library": Net.__module__}
    assert sorted(written["target_modules"]) == sorted(before["target_modules"])
    config.task_type = "CAUSAL_LM"
    save_adapters(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"] is None


def test_aliases_and_views_are_written_in_full(tmp_path):
    model, _ = adapted(CONFIGS["LORA"]["linear"]())
    lin, wide = model.lin, model.wide
    shared = torch.randn(2, 8)
    lin.lora_A["default"].weight = wide.lora_A["default"].weight = nn.Parameter(shared)
    lin.lora_B["default"].weight = nn.Parameter(torch.randn(4, 8).t()[:, :2])  # a view, and not contiguous
    save_adapters(model, tmp_path)
    found = load_peft_weights(tmp_path)
    assert torch.equal(found["wide.lora_A.weight"], shared)
    assert torch.equal(found["lin.lora_B.weight"], lin.lora_B["default"].weight)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * (2 * 16 + 2 * 16) + 600


def test_gpt2_figures(tmp_path):
    """811,008 parameters and 3.24 MB for r=8 on both projections of GPT-2, counted on the meta device's shapes."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    inject(plan(model, config_class("LORA")(r=8, target_modules=["c_attn", "c_proj"])))
    slots = adapter_slots(model)
    assert sum(math.prod(target.shape) for target in slots.values()) == 811_008
    set_peft_model_state_dict(model, {key: torch.zeros(target.shape) for key, target in slots.items()})
    save_adapters(model, tmp_path)
    header = (tmp_path / "adapter_model.safetensors").stat().st_size - 811_008 * 4
    assert 0 < header < 20_000
    assert round(811_008 * 4 / 1e6, 2) == 3.24


def test_vera_without_its_bases_is_refused():
    model, _ = adapted(CONFIGS["VERA"]["saved"]())
    values = get_peft_model_state_dict(model)
    short = {key: value for key, value in values.items() if "vera_A" not in key}
    again, _ = adapted(CONFIGS["VERA"]["saved"](), policy=PEFT)
    with pytest.raises(ValueError, match=r"base_model\.vera_A"):
        set_peft_model_state_dict(again, short)


def test_vera_bases_that_the_config_regenerates_are_left_alone():
    model, _ = adapted(CONFIGS["VERA"]["saved"]())
    values = get_peft_model_state_dict(model)
    again, _ = adapted(CONFIGS["VERA"]["regenerated"]())
    with pytest.warns(UserWarning, match="made again|make it again"):
        set_peft_model_state_dict(again, values)


def test_loaded_for_inference_or_training(tmp_path):
    model, _ = adapted(CONFIGS["LORA"]["copy"]())
    save_adapters(model, tmp_path)
    frozen, free = net().train(), net().train()
    load_all(frozen, tmp_path)
    load_all(free, tmp_path, is_trainable=True)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(
        target.tensor.requires_grad
        for target in adapter_slots(free).values()
        if target.tensor.is_leaf and isinstance(target.tensor, nn.Parameter)
    )
    assert not frozen.training
    assert free.training


def test_one_adapter_by_config_and_tensors(tmp_path):
    model, _ = adapted(CONFIGS["LORA"]["linear"](), "a")
    shaken(model, "a")
    save_adapters(model, tmp_path)
    config, tensors = load_adapter_files(tmp_path, "a")
    assert config.r == 2
    assert_same(dict(sorted(tensors.items())), dict(sorted(adapter_tensors(model, "a").items())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mapped = load_peft_weights(tmp_path, subfolder="a", key_mapping={r"^lin\.": "layers.0."})
    assert "layers.0.lora_A.weight" in mapped
    assert "wide.lora_A.weight" in mapped
