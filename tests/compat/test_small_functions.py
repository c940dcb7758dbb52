"""The small functions of peft.utils beside the real ones, on the same arguments."""

from __future__ import annotations

import peft.auto
import peft.utils.constants
import peft.utils.integrations
import peft.utils.other
import peft.utils.save_and_load
import pytest
import torch
from torch import nn

import inlay.compat.peft.auto as own_auto
import inlay.compat.peft.utils.constants as own_constants
import inlay.compat.peft.utils.integrations as own_integrations
import inlay.compat.peft.utils.other as own_other
import inlay.compat.peft.utils.save_and_load as own_saving


def outcome(function, *args, **kwargs):
    """Return what a call gives, or the type of what it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return next(cls for cls in type(error).__mro__ if cls.__module__ == "builtins")


CALLS = [
    ("str_to_bool", ["yes"]),
    ("str_to_bool", ["OFF"]),
    ("str_to_bool", ["maybe"]),
    ("get_pattern_key", [["a", "b.c"], "x.b.c"]),
    ("get_pattern_key", [["z", "y.*"], "x.b.c"]),
    ("get_pattern_key", [[r".*\.c"], "x.b.c"]),
    ("_is_valid_match", ["x.b.c", "b.c"]),
    ("_is_valid_match", ["x.b.c", "b"]),
    ("_is_valid_match", ["xb.c", "b.c"]),
    ("_get_batch_size", [torch.zeros(3, 2), None]),
    ("_get_batch_size", [None, torch.zeros(4, 2, 1)]),
    ("_get_batch_size", [None, None]),
    ("infer_device", []),
    ("get_gptqmodel_quant_linear", [None]),
    ("is_gptqmodel_quant_linear", [nn.Linear(2, 2)]),
    ("get_quantization_config", [nn.Linear(2, 2), "gptq"]),
    ("_get_input_embeddings_name", [nn.Linear(2, 2)]),
    ("_get_input_embeddings_name", [nn.Linear(2, 2), "there"]),
    ("_get_no_split_modules", [nn.Linear(2, 2)]),
    ("check_file_exists_on_hf_hub", ["no/such", "file"]),
]


@pytest.mark.parametrize(("name", "arguments"), CALLS, ids=lambda value: str(value)[:30])
def test_other(name, arguments):
    assert outcome(getattr(own_other, name), *arguments) == outcome(getattr(peft.utils.other, name), *arguments)


def test_matching_returns_the_match():
    for pattern, key in (("x.*", "x.b"), ("b", "x.b")):
        own, theirs = (m.match_target_against_key(pattern, key) for m in (own_other, peft.utils.other))
        assert bool(own) is bool(theirs)


def test_modules_by_name():
    model = nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"a": nn.Linear(2, 2)}))
    for name in ("_get_submodules", "_get_submodules_with_grandparent"):
        own, theirs = (getattr(m, name)(model, "1.a") for m in (own_other, peft.utils.other))
        assert all(left is right or left == right for left, right in zip(own, theirs, strict=True))
        assert outcome(getattr(own_other, name), model, "1.b") is outcome(getattr(peft.utils.other, name), model, "1.b")


def test_tied_modules(tiny_gpt2):
    for function in ("_get_input_embeddings_name", "_get_no_split_modules", "_get_module_names_tied_with_embedding"):
        own, theirs = (getattr(m, function)(tiny_gpt2) for m in (own_other, peft.utils.other))
        assert own == theirs


def test_transposed_parameters_stay_parameters():
    weight = nn.Parameter(torch.randn(2, 3))
    for value, flip in ((weight, True), (weight, False), (weight.detach(), True)):
        own, theirs = (m.transpose(value, flip) for m in (own_other, peft.utils.other))
        assert torch.equal(own, theirs)
        assert type(own) is type(theirs)


def test_shared_storage_is_seen():
    held = torch.zeros(4)
    for module in (own_other, peft.utils.other):
        assert module.id_tensor_storage(held) == module.id_tensor_storage(held.view(2, 2))
        assert module.id_tensor_storage(held) != module.id_tensor_storage(held.clone())
    assert own_other.id_tensor_storage(held) == peft.utils.other.id_tensor_storage(held)


@pytest.mark.parametrize("buffers", [None, False, True])
def test_empty_weights(buffers):
    for module in (own_integrations, peft.utils.integrations):
        real = module.skip_init_on_device(lambda: nn.Linear(2, 2))
        with module.init_empty_weights(include_buffers=buffers):
            norm = nn.BatchNorm1d(2)
            kept = None if buffers else real()
        assert norm.weight.is_meta
        assert norm.running_mean.is_meta is bool(buffers)
        assert kept is None or not kept.weight.is_meta
        assert not nn.Linear(2, 2).weight.is_meta


def test_plain_weights_need_no_dequantising():
    layer = nn.Linear(2, 3)
    for module in (own_integrations, peft.utils.integrations):
        assert module.dequantize_module_weight(layer) is layer.weight
        assert module.get_bnb_param_type(layer.weight) is False
        assert module.check_deepspeed_zero3_enabled() is False


def test_device_maps(tiny_gpt2):
    tiny_gpt2.hf_device_map = {"transformer.wte": 0, "transformer.h.0": 0, "transformer.h.1": "cpu"}
    try:
        own, theirs = (m.get_layer_device_map(tiny_gpt2) for m in (own_integrations, peft.utils.integrations))
    finally:
        del tiny_gpt2.hf_device_map
    assert own == theirs == {0: 0, 1: 0}


def test_allowlists():
    assert own_auto.get_default_import_allowlist() == peft.auto.get_default_import_allowlist()
    for allowed, module in (
        (["transformers"], "transformers.models"),
        (["transformers"], "transformers_evil"),
        (["a.b"], "a.b.c"),
        (["a.b"], "a"),
        ([], "x"),
    ):
        assert own_auto.check_import_allowlist(allowed, module) == peft.auto.check_import_allowlist(allowed, module)


def test_cache_layouts():
    prefix = [torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)]
    own = own_constants.bloom_model_postprocess_past_key_value(prefix)
    theirs = peft.utils.constants.bloom_model_postprocess_past_key_value(prefix)
    for layer, ((keys, values), (their_keys, their_values)) in enumerate(zip(own, theirs, strict=True)):
        assert torch.equal(values, their_values)
        right = prefix[0][layer].flatten(0, 1).mT  # (batch * heads, head_dim, tokens), as Bloom keeps its keys
        assert torch.equal(keys, right)
        assert their_keys.shape == right.shape  # peft mixes up heads and tokens
        assert not torch.equal(their_keys, right)
    own = own_constants.starcoder_model_postprocess_past_key_value(prefix)
    theirs = peft.utils.constants.starcoder_model_postprocess_past_key_value(prefix)
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))


def test_names_in_keys():
    keys = {"a.lora_A.weight": 1, "a.lora_embedding_A": 2, "q.w": 3, "b.lora_magnitude_vector": 4}
    arguments = (keys, "default", "lora_")
    name = "_insert_adapter_name_into_state_dict"
    assert getattr(own_saving, name)(*arguments) == getattr(peft.utils.save_and_load, name)(*arguments)
    mixed = {"a.lora_A.x.weight": 1, "a.lora_A.y.weight": 2, "b.lora_embedding_A.y": 3}
    name = "_filter_state_dict_for_adapter_name"
    assert getattr(own_saving, name)(mixed, ["y"]) == getattr(peft.utils.save_and_load, name)(mixed, ["y"])


def test_embedding_names():
    model = nn.Sequential(nn.Linear(2, 2))
    for adapted in (False, True):
        arguments = (model, model[0], adapted)
        own, theirs = (m.get_embedding_layer_name(*arguments) for m in (own_saving, peft.utils.save_and_load))
        assert own == theirs
