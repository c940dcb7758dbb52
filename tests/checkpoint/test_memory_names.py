"""Values given as a whole model's state dict, wrappers around the model, sharded tensors."""

from __future__ import annotations

import pytest
import torch
from models_to_save import CASES, CONFIGS, adapted, assert_same, shaken
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from inlay.checkpoint import adapter_slots, get_peft_model_state_dict, set_peft_model_state_dict
from inlay.errors import CheckpointError


def raised(state_dict):
    return {name: value + 1 if value.is_floating_point() else value for name, value in state_dict.items()}


@pytest.mark.parametrize(("method", "case"), CASES, ids=lambda part: part.lower())
def test_memory_names_are_those_of_the_model(method, case):
    model, _ = adapted(CONFIGS[method][case](), "some")
    names = model.state_dict(keep_vars=True)
    for target in adapter_slots(model, "some").values():
        assert names[target.memory] is target.tensor


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "base_model.model."])
def test_values_of_a_state_dict(prefix):
    model, _ = adapted(CONFIGS["LORA"]["bias_and_copy"]())
    adapted(CONFIGS["LORA"]["linear"](), "other", model)
    given = {f"{prefix}{name}": value for name, value in raised(model.state_dict()).items()}
    names, own = set(given), get_peft_model_state_dict(model)
    found = get_peft_model_state_dict(model, state_dict=given)
    assert set(given) == names
    assert_same(found, raised(own))


def test_a_state_dict_that_lacks_something():
    model, _ = adapted(CONFIGS["LORA"]["linear"]())
    given = {name: value for name, value in model.state_dict().items() if "lin.lora_A" not in name}
    with pytest.raises(CheckpointError, match=r"expected 'lin\.lora_A\.default\.weight'"):
        get_peft_model_state_dict(model, state_dict=given)
    # what never trains may be left out, as exports of trainable parameters do
    vera, _ = adapted(CONFIGS["VERA"]["saved"]())
    given = {name: p for name, p in vera.named_parameters() if p.requires_grad}
    assert_same(get_peft_model_state_dict(vera, state_dict=given), get_peft_model_state_dict(vera))


def test_a_state_dict_of_shards_is_refused():
    model, _ = adapted(CONFIGS["LORA"]["linear"]())
    given = model.state_dict()
    given["lin.lora_A.default.weight"] = torch.empty(0)  # what ZeRO-3 leaves in other processes
    with pytest.raises(CheckpointError, match=r"lin\.lora_A\.default\.weight.*not gathered"):
        get_peft_model_state_dict(model, state_dict=given)


def test_compiled_models_and_parts():
    model, _ = adapted(CONFIGS["LORA"]["kinds"]())
    expected = {key: value.clone() for key, value in get_peft_model_state_dict(shaken(model)).items()}
    whole = torch.compile(model, backend="eager")
    assert_same(get_peft_model_state_dict(whole), expected)
    assert_same(get_peft_model_state_dict(whole, unwrap_compiled=True), expected)
    assert_same(get_peft_model_state_dict(whole, state_dict=whole.state_dict()), expected)
    outer = nn.Sequential()
    outer.add_module("part", torch.compile(model, backend="eager"))
    found = get_peft_model_state_dict(outer)
    assert_same({key.removeprefix("part."): value for key, value in found.items()}, expected)
    assert all(key.startswith("part.") for key in found)
    assert_same(get_peft_model_state_dict(outer, state_dict=outer.state_dict()), found)
    set_peft_model_state_dict(outer, raised(found))
    assert_same(get_peft_model_state_dict(model), raised(expected))


@pytest.fixture
def mesh(tmp_path):

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("low_memory", [False, True], ids=["in_place", "assigned"])
def test_sharded_tensors_are_saved_whole_and_loaded_sharded(mesh, low_memory):
    """One process; tests/parallel does it with two."""
    model, _ = adapted(CONFIGS["LORA"]["linear"]())
    expected = {key: value.clone() for key, value in get_peft_model_state_dict(shaken(model)).items()}
    again, _ = adapted(CONFIGS["LORA"]["linear"](), low_memory=low_memory)
    for target in adapter_slots(again).values():
        sharded = distribute_tensor(target.tensor.detach(), mesh, [Shard(0)])
        target.module._parameters[target.attribute] = nn.Parameter(sharded)
    set_peft_model_state_dict(again, expected)
    assert all(isinstance(target.tensor, DTensor) for target in adapter_slots(again).values())
    found = get_peft_model_state_dict(again)
    assert not any(isinstance(tensor, DTensor) for tensor in found.values())
    assert_same(found, expected)
    given = again.state_dict()
    assert any(isinstance(value, DTensor) for value in given.values())
    assert_same(get_peft_model_state_dict(again, state_dict=given), expected)
