"""What does not fit is said before anything is written, and then nothing is written."""

from __future__ import annotations

import warnings

import pytest
import torch
from models_to_save import CONFIGS, adapted, assert_same, everything, net, shaken
from safetensors.torch import save_file
from torch import nn

from inlay.checkpoint import (
    adapter_slots,
    adapter_tensors,
    get_peft_model_state_dict,
    load_all,
    load_peft_weights,
    load_tensors,
    save_adapters,
    set_peft_model_state_dict,
)
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.policy import INLAY, PEFT
from inlay.core.registry import config_class
from inlay.core.state import find_state
from inlay.errors import (
    CheckpointMismatchError,
    StateError,
    UnknownAdapterError,
)

CASE = CONFIGS["LORA"]["copy"]


def values():
    model, _ = adapted(CASE())
    return dict(get_peft_model_state_dict(shaken(model)))


def misshape(held):
    held["lin.lora_A.weight"] = torch.ones(3, 8)


def drop(held):
    del held["lin.lora_B.weight"]


def add(held):
    held["lin.lora_C.weight"] = torch.ones(2, 8)


def misspell(held):
    held["lin.lora_X.weight"] = held.pop("lin.lora_A.weight")


def drop_copy(held):
    del held["head.0.bias"]


BREAK = {
    "shape": (misshape, r"'lin\.lora_A\.weight' is \(3, 8\), expected \(2, 8\)", "both"),
    "missing": (drop, r"1 keys are missing .*'lin\.lora_B\.weight'", "inlay"),
    "extra": (add, r"'lin\.lora_C\.weight' \(near: 'lin\.lora_[AB]\.weight'\)", "inlay"),
    "misspelt": (misspell, r"lora_X.*near.*missing.*lora_A", "inlay"),
    "copy": (drop_copy, r"missing .*'head\.0\.bias'", "both"),
}


@pytest.mark.parametrize("policy", [INLAY, PEFT], ids=lambda policy: policy.name)
@pytest.mark.parametrize("how", BREAK)
def test_what_does_not_fit(how, policy):
    spoil, message, raised_by = BREAK[how]
    held = values()
    spoil(held)
    model, _ = adapted(CASE(), policy=policy)
    before = everything(model)
    if raised_by == "both" or policy is INLAY:
        with pytest.raises(CheckpointMismatchError, match=message) as caught:
            set_peft_model_state_dict(model, held)
        assert isinstance(caught.value, RuntimeError)
        assert isinstance(caught.value, ValueError)
        assert_same(everything(model), before)
        return
    result = set_peft_model_state_dict(model, held)
    missing, extra = set(adapter_slots(model)) - held.keys(), held.keys() - adapter_slots(model).keys()
    assert result.missing_keys == [key.replace(".weight", ".default.weight") for key in missing]
    assert set(result.unexpected_keys) == extra
    after = everything(model)
    for key in held.keys() - extra:
        assert torch.equal(adapter_tensors(model)[key], held[key])
    for name in result.missing_keys:
        assert torch.equal(after[name], before[name])


def test_other_sizes_may_be_left_out():
    held = values()
    misshape(held)
    model, _ = adapted(CASE())
    before = adapter_tensors(model)["lin.lora_A.weight"].clone()
    with pytest.warns(UserWarning, match=r"left out.*'lin\.lora_A\.weight' is \(3, 8\)"):
        result = set_peft_model_state_dict(model, held, ignore_mismatched_sizes=True)
    assert result.missing_keys == ["lin.lora_A.default.weight"]
    assert torch.equal(adapter_tensors(model)["lin.lora_A.weight"], before)
    assert torch.equal(adapter_tensors(model)["lin.lora_B.weight"], held["lin.lora_B.weight"])


def test_an_adapter_of_another_architecture(tmp_path):
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))

    other = Other()
    inject(plan(other, config_class("LORA")(r=2, target_modules="all-linear")))
    save_adapters(other, tmp_path)
    model, _ = adapted(config_class("LORA")(r=2, target_modules=["lin"]))
    with pytest.raises(CheckpointMismatchError) as caught:
        set_peft_model_state_dict(model, load_peft_weights(tmp_path))
    message = str(caught.value)
    assert "'blocks.0.lora_A.weight'" in message
    assert "and 13 more" in message
    assert "'lin.lora_A.weight'" in message
    assert len(message) < 1500


def test_load_all_that_fails_leaves_the_model_as_it_was(tmp_path):
    """The second adapter does not fit: the first one goes away again."""
    model, _ = adapted(CONFIGS["LORA"]["linear"](), "first")
    adapted(CONFIGS["LORA"]["bias_and_copy"](), "second", model)
    save_adapters(model, tmp_path)
    for spoil in (lambda held: held.popitem(), lambda held: held.update(more=torch.ones(1))):
        held = load_peft_weights(tmp_path / "second")
        spoil(held)
        save_file(held, tmp_path / "second" / "adapter_model.safetensors")
        fresh = net()
        modules, before = list(fresh.modules()), everything(fresh)
        with pytest.raises(CheckpointMismatchError, match="second"):
            load_all(fresh, tmp_path)
        assert [id(module) for module in fresh.modules()] == [id(module) for module in modules]
        assert_same(everything(fresh), before)
        assert all(parameter.requires_grad for parameter in fresh.parameters())
        assert find_state(fresh) is None

        kept, state = adapted(CONFIGS["LORA"]["linear"](), "mine")
        before = everything(kept)
        with pytest.raises(CheckpointMismatchError, match="second"):
            load_all(kept, tmp_path)
        assert list(state.records) == ["mine"]
        assert state.active == ("mine",)
        assert_same(everything(kept), before)


def test_strictness_can_be_chosen():
    held = values()
    drop(held)
    model, _ = adapted(CASE())
    assert load_tensors(model, held, strict=False).missing_keys == ["lin.lora_B.default.weight"]
    lenient, _ = adapted(CASE(), policy=PEFT)
    with pytest.raises(CheckpointMismatchError, match=r"out/file: .*missing"):
        load_tensors(lenient, held, strict=True, source="out/file")


def test_merged_adapters_are_not_loaded_into():
    model, state = adapted(CONFIGS["LORA"]["linear"]())
    held = get_peft_model_state_dict(model)
    merge(state)
    before = everything(model)
    with pytest.raises(StateError, match="merged"):
        set_peft_model_state_dict(model, {key: value + 1 for key, value in held.items()})
    assert_same(everything(model), before)
    assert_same(get_peft_model_state_dict(model), held)  # saving is fine
    unmerge(state)


def test_names_and_models_that_are_not_there():
    with pytest.raises(StateError, match="no adapters"):
        get_peft_model_state_dict(net())
    model, _ = adapted(CASE())
    with pytest.raises(KeyError, match=r"defalt.*default"):
        get_peft_model_state_dict(model, adapter_name="defalt")
    with pytest.raises(UnknownAdapterError):
        set_peft_model_state_dict(model, {}, "other")
    with pytest.raises(ValueError, match="other"):
        save_adapters(model, "never", selected_adapters=["other"])


def test_retired_formats_are_named():
    model, _ = adapted(CONFIGS["OFT"]["kinds"](), policy=PEFT)
    with pytest.raises(ValueError, match=r"oft_r.*0\.15"):
        set_peft_model_state_dict(model, {"base_model.model.lin.oft_r": torch.zeros(1)})


def test_older_spellings():
    """Magnitudes with ``.weight``, copies with their segment, biases without ``base_layer``; with or without prefix."""
    config = {"r": 2, "target_modules": ["lin"], "use_dora": True, "bias": "all", "modules_to_save": ["head"]}
    model, _ = adapted(config_class("LORA")(**config))
    held = dict(get_peft_model_state_dict(shaken(model)))
    old = dict(held)
    old["lin.lora_magnitude_vector.weight"] = old.pop("lin.lora_magnitude_vector")
    old["lin.bias"] = old.pop("lin.base_layer.bias")
    old["head.modules_to_save.0.weight"] = old.pop("head.0.weight")
    old["head.modules_to_save.default.0.bias"] = old["head.0.bias"]  # PEFT's bias="all" writes it twice
    for prefix in ("", "base_model.model."):
        again, _ = adapted(config_class("LORA")(**config))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            set_peft_model_state_dict(again, {f"{prefix}{key}": value for key, value in old.items()})
        assert_same(get_peft_model_state_dict(again), held)
    old["head.modules_to_save.default.0.bias"] = old["head.0.bias"] + 1
    with pytest.raises(CheckpointMismatchError, match=r"mean nothing .*modules_to_save\.default\.0\.bias"):
        set_peft_model_state_dict(again, old)
