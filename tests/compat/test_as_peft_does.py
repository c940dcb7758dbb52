"""What PEFT's own tests showed, held beside PEFT: draws, warnings, base biases in a file, keywords of loading."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import inlay
import inlay.compat.peft as drop_in
from inlay.core.policy import PEFT, default_policy, set_default_policy
from inlay.errors import CheckpointKeyError, CheckpointMismatchError, TargetError, TargetWarning, UnsupportedError

LIBRARIES = [pytest.param(peft, id="peft"), pytest.param(drop_in, id="inlay")]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.lin0 = nn.Linear(8, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.lin1 = nn.Linear(6, 6, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.conv(self.lin1(self.lin0(self.emb(x))).transpose(1, 2))


def small() -> Small:
    torch.manual_seed(7)
    return Small()


@pytest.fixture
def as_peft() -> Any:
    before = default_policy()
    set_default_policy(PEFT)
    yield
    set_default_policy(before)


def says(what: list[Any], kind: type[Warning]) -> list[str]:
    return [str(warning.message) for warning in what if issubclass(warning.category, kind)]


@pytest.mark.parametrize("start", [True, "gaussian", False])
@pytest.mark.parametrize("targets", [["lin0", "lin1"], ["emb"], ["conv"], ["emb", "conv", "lin0"]])
def test_one_seed_gives_pefts_initial_values(start: bool | str, targets: list[str]) -> None:
    states = []
    for library in (peft, drop_in):
        model = small()
        torch.manual_seed(0)
        config = library.LoraConfig(target_modules=targets, r=2, init_lora_weights=start)
        states.append(library.get_peft_model(model, config).state_dict())
        states[-1]["next"] = torch.rand(3)  # what is drawn afterwards is the same too
    theirs, ours = states
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_the_own_policy_draws_from_site_and_slot() -> None:
    values = []
    for before in (0, 5):
        torch.manual_seed(0)
        torch.rand(before)
        model = inlay.get_peft_model(small(), inlay.LoraConfig(target_modules=["lin0"], r=2))
        values.append(model.base_model.model.lin0.lora_A["default"].weight)
    assert torch.equal(*values)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lin0"], "rank_pattern": {"nowhere": 4}},
        {"target_modules": ["lin0"], "alpha_pattern": {"nowhere": 4}},
        {"target_modules": ["lin0"], "target_parameters": ["nowhere.weight"]},
        {"target_modules": ["nowhere"], "target_parameters": ["lin0.weight"]},
    ],
)
def test_a_pattern_that_matches_nothing_is_a_runtime_warning(library: Any, options: dict[str, Any]) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        library.get_peft_model(small(), library.LoraConfig(**options))
    assert any("nowhere" in message for message in says(heard, RuntimeWarning))
    with pytest.raises(TargetError, match="nowhere"):
        inlay.get_peft_model(small(), inlay.LoraConfig(**options))


def test_matching_patterns_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TargetWarning)
        config = drop_in.LoraConfig(target_modules=["lin0", "nowhere"], rank_pattern={"lin0": 4})
        drop_in.get_peft_model(small(), config)  # of target_modules, one match is enough, as in PEFT


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_base_biases_load_into_an_adapter_that_trains_none(library: Any, bias: str) -> None:
    trained = library.get_peft_model(small(), library.LoraConfig(target_modules=["lin0"], r=2, bias=bias))
    trained.base_model.model.lin0.bias.data.fill_(1.25)
    held = library.get_peft_model_state_dict(trained)
    model = library.get_peft_model(small(), library.LoraConfig(target_modules=["lin0"], r=2))
    library.set_peft_model_state_dict(model, held)
    assert torch.equal(model.base_model.model.lin0.bias, torch.full((6,), 1.25))


def test_unloading_gives_such_biases_back_and_the_own_policy_refuses_them() -> None:
    trained = drop_in.get_peft_model(small(), drop_in.LoraConfig(target_modules=["lin0"], r=2, bias="all"))
    trained.base_model.model.lin0.bias.data.fill_(1.25)
    held = drop_in.get_peft_model_state_dict(trained)
    model = drop_in.get_peft_model(small(), drop_in.LoraConfig(target_modules=["lin0"], r=2))
    drop_in.set_peft_model_state_dict(model, held)
    assert torch.equal(model.unload().lin0.bias, small().lin0.bias)
    strict = inlay.get_peft_model(small(), inlay.LoraConfig(target_modules=["lin0"], r=2))
    with pytest.raises(CheckpointMismatchError, match="bias"):
        inlay.set_peft_model_state_dict(strict, held)


def test_device_map_means_nothing_where_nothing_is_offloaded(as_peft: None, tmp_path: Path) -> None:
    model = drop_in.get_peft_model(small(), drop_in.LoraConfig(target_modules=["lin0"], r=2))
    model.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(small(), tmp_path, device_map={"": "cpu"})
    loaded = drop_in.PeftModel.from_pretrained(small(), tmp_path, device_map={"": "cpu"})
    loaded.load_adapter(tmp_path, "other", device_map={"": "cpu"})
    spread = small()
    spread.hf_device_map = {"emb": "cpu", "lin0": 0}  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match="offloaded"):
        drop_in.PeftModel.from_pretrained(spread, tmp_path, device_map="auto")


def test_device_map_is_refused_by_the_own_policy(tmp_path: Path) -> None:
    inlay.get_peft_model(small(), inlay.LoraConfig(target_modules=["lin0"], r=2)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="device_map"):
        inlay.PeftModel.from_pretrained(small(), tmp_path, device_map={"": "cpu"})


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_config_without_peft_type_is_a_type_error(library: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"foo": 1}')
    with pytest.raises(TypeError) as caught:
        library.LoraConfig.from_pretrained(tmp_path)
    assert library is peft or isinstance(caught.value, CheckpointKeyError)


@pytest.mark.parametrize("library", LIBRARIES)
def test_merging_one_of_two_rescalings_and_dropping_the_other(library: Any) -> None:
    config = library.IA3Config(target_modules=["lin0"], feedforward_modules=[], init_ia3_weights=False)
    model = library.get_peft_model(small(), config, "one")
    model.add_adapter("two", config)
    model.base_model.set_adapter(["one", "two"])
    torch.manual_seed(1)
    for scale in model.base_model.model.lin0.ia3_l.values():
        scale.data = torch.rand(6, 1) + 0.5
    kept = copy.deepcopy(model)
    kept.base_model.set_adapter(["one"])
    x = torch.arange(5).unsqueeze(0)
    expected = kept(x)
    assert torch.allclose(model.merge_and_unload(adapter_names=["one"])(x), expected, atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_full_copies_come_before_targets_for_every_adapter(library: Any) -> None:
    config = library.LoraConfig(target_modules=["lin0", "lin1"], modules_to_save=["lin1"], r=2)
    model = library.get_peft_model(small(), config, "one")
    model.add_adapter("two", config)
    assert set(model.base_model.model.lin1.modules_to_save) == {"one", "two"}


@pytest.mark.parametrize("library", LIBRARIES)
def test_held_configs_forget_the_last_adapter(library: Any) -> None:
    model = library.get_peft_model(small(), library.LoraConfig(target_modules=["lin0"], r=2), "only")
    held = model.peft_config
    model.delete_adapter("only")
    assert "only" not in held


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_bias_that_the_layer_lacks_warns(library: Any) -> None:
    config = library.LoraConfig(target_modules=["lin1"], r=2, lora_bias=True)
    with pytest.warns(UserWarning, match="bias"):
        library.get_peft_model(small(), config)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_overwritten_is_said(library: Any) -> None:
    model = small()
    model.name_or_path = "here"  # type: ignore[assignment]
    config = library.LoraConfig(target_modules=["lin0"], r=2, base_model_name_or_path="there", revision="a")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        library.get_peft_model(model, config, revision="b")
    text = " ".join(says(list(heard), UserWarning))
    assert "'there'" in text
    assert "'here'" in text
    assert "revision" in text
    with pytest.warns(UserWarning, match="unload"):
        library.get_peft_model(model, library.LoraConfig(target_modules=["lin1"], r=2), "other")


@pytest.mark.parametrize("library", LIBRARIES)
def test_merging_a_bias_that_the_layer_lacks_is_a_runtime_error(library: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = library.LoraConfig(target_modules=["lin1"], r=2, lora_bias=True)
        model = library.get_peft_model(small(), config)
    before = model.base_model.model.lin1.base_layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match="bias"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(model.base_model.model.lin1.base_layer.weight, before)


@pytest.mark.parametrize("library", [*LIBRARIES, pytest.param(inlay, id="own policy")])
@pytest.mark.parametrize("beside", [{"trainable_token_indices": [0, 1]}, {"target_parameters": ["o_proj.weight"]}])
def test_default_targets_stand_beside_tokens_and_parameters(library: Any, beside: dict[str, Any]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 20}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes))
    adapted = library.get_peft_model(model, library.LoraConfig(r=2, **beside))
    assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}
    assert any("q_proj.lora_A" in name for name, _ in adapted.named_parameters())
