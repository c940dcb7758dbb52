"""Adapters that were trained on transformers 4, where experts were lists of layers, on models that stack them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import experts
import peftless
import pytest
import tiny
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    FlattenDims,
    PeftConcatenate,
    PermuteDims,
    build_peft_weight_mapping,
    convert_peft_adapter_state_dict_for_transformers,
    convert_peft_config_for_transformers,
)
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping

import inlay

IDS = tiny.tokens()
DENSE = {"mlp_only_layers": [0]}

# name -> family, model's changes, targets, options of experts.write_old_adapter
CASES: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {}, ["q_proj", "w1", "w2", "w3"], {}),
    "router": ("Mixtral", {}, ["q_proj", "w1", "w2", "w3", "gate"], {}),
    "router alone": ("Mixtral", {}, ["gate"], {}),
    "down alone": ("Mixtral", {}, ["w2"], {}),
    "gate and up alone": ("Mixtral", {}, ["w1", "w3"], {}),
    "rslora": ("Mixtral", {}, ["q_proj", "w1", "w2", "w3"], {"use_rslora": True}),
    "ranks": ("Mixtral", {}, ["q_proj", "w1", "w2", "w3"], {"ranks": {"w1": 2, "w3": 2}}),
    "ranks and alphas": ("Mixtral", {}, ["w1", "w2", "w3"], {"ranks": {"w1": 2}, "alpha_pattern": {"w1": 4}}),
    "dropout": ("Mixtral", {}, ["q_proj", "w1", "w2", "w3"], {"lora_dropout": 0.1}),
    "qwen2": ("Qwen2Moe", {}, ["q_proj", "gate_proj", "up_proj", "down_proj"], {}),
    "qwen3": ("Qwen3Moe", {}, ["v_proj", "gate_proj", "up_proj", "down_proj", "gate"], {}),
    "some layers": ("Mixtral", {}, ["q_proj", "w1", "w2", "w3"], {"layers_to_transform": [1]}),
    "olmoe": ("Olmoe", {}, ["q_proj", "gate_proj", "up_proj", "down_proj"], {}),
    "phimoe": ("Phimoe", {}, ["q_proj", "w1", "w2", "w3"], {}),
    "jamba": ("Jamba", {}, ["q_proj", "gate_proj", "up_proj", "down_proj", "router"], {}),
    "lfm2": ("Lfm2Moe", {}, ["q_proj", "w1", "w2", "w3"], {}),
    "dense layer": ("Qwen3Moe", DENSE, ["q_proj", "gate_proj", "up_proj", "down_proj"], {}),
}
# what peft refuses, and only an adapter with its tensors can answer
PARTIAL: dict[str, tuple[str, dict[str, Any], Any, dict[str, Any]]] = {
    "gate without up": ("Mixtral", {}, ["w1"], {}),
    "some experts": ("Mixtral", {}, ["block_sparse_moe.experts.1.w1", "experts.2.w2", "experts.3.w1"], {}),
}


def prepared(case: str, folder: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Write an old adapter; returns a fresh model in float64, and what it gives with the adapter and without."""
    family, changes, targets, options = (CASES | PARTIAL)[case]
    experts.write_old_adapter(folder, tiny.decoder(family, **changes), family, targets, **options)
    want = experts.merged_by_hand(tiny.decoder(family, **changes), family, folder)(IDS).logits
    model = tiny.decoder(family, **changes).double()
    base = model(IDS).logits
    assert (want - base).abs().max() > 1e-3
    return model, want, base


@pytest.mark.parametrize("case", CASES | PARTIAL)
def test_wrapper_loads_it_and_saves_it_as_it_is_now(case: str, tmp_path: Path) -> None:
    model, want, base = prepared(case, tmp_path)
    wrapper = PeftModel.from_pretrained(model, tmp_path)
    torch.testing.assert_close(wrapper(IDS).logits, want)
    with wrapper.disable_adapter():
        torch.testing.assert_close(wrapper(IDS).logits, base)
    wrapper.save_pretrained(tmp_path / "again")
    assert not [key for key in load_file(tmp_path / "again" / "adapter_model.safetensors") if ".experts.1." in key]
    family, changes, _, _ = (CASES | PARTIAL)[case]
    again = PeftModel.from_pretrained(tiny.decoder(family, **changes).double(), tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, want)


@pytest.mark.parametrize("case", CASES | PARTIAL)
def test_strict_inlay_loads_it(case: str, tmp_path: Path) -> None:
    from inlay.core.policy import INLAY, PEFT, set_default_policy

    model, want, _ = prepared(case, tmp_path)
    set_default_policy(INLAY)
    try:
        torch.testing.assert_close(inlay.PeftModel.from_pretrained(model, tmp_path)(IDS).logits, want)
    finally:
        set_default_policy(PEFT)


@pytest.mark.parametrize("case", CASES)
def test_mixin_loads_it(case: str, tmp_path: Path) -> None:
    model, want, _ = prepared(case, tmp_path)
    report = model.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert not report.mismatched_keys
    torch.testing.assert_close(model(IDS).logits, want)


@pytest.mark.parametrize("case", CASES)
def test_low_level_calls(case: str, tmp_path: Path) -> None:
    model, want, _ = prepared(case, tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    wrapper = get_peft_model(model, config).eval()
    set_peft_model_state_dict(wrapper, load_file(tmp_path / "adapter_model.safetensors"))
    torch.testing.assert_close(wrapper(IDS).logits, want)


def test_one_after_the_other(tmp_path: Path) -> None:
    model, first, _ = prepared("mixtral", tmp_path / "a")
    experts.write_old_adapter(tmp_path / "b", tiny.mixtral(), "Mixtral", ["w1", "w2", "w3"], r=2, seed=9)
    second = experts.merged_by_hand(tiny.mixtral(), "Mixtral", tmp_path / "b")(IDS).logits
    wrapper = PeftModel.from_pretrained(model, tmp_path / "a", "a")
    wrapper.load_adapter(tmp_path / "b", "b")
    torch.testing.assert_close(wrapper(IDS).logits, first)
    wrapper.set_adapter("b")
    torch.testing.assert_close(wrapper(IDS).logits, second)
    wrapper.delete_adapter("a")
    torch.testing.assert_close(wrapper(IDS).logits, second)
    merged = wrapper.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, second)


def test_dora_of_experts(tmp_path: Path) -> None:
    """DoRA: the rows of ``W + s B A`` at their trained lengths, expert by expert."""
    targets = ["w1", "w2", "w3"]
    tensors = experts.write_old_adapter(tmp_path, tiny.mixtral(), "Mixtral", targets, use_dora=True)
    wanted = tiny.mixtral().double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, (_, _, _, matrix) in experts.old_shapes(wanted, "Mixtral", targets).items():
            key = f"base_model.model.{path}"
            length = torch.rand(matrix.shape[0], generator=generator) + 0.1
            tensors[f"{key}.lora_magnitude_vector"] = length
            A, B = (tensors[f"{key}.lora_{role}.weight"].double() for role in "AB")
            moved = matrix + 6 / 3 * B @ A
            matrix.copy_(length.double()[:, None] * moved / moved.norm(dim=1, keepdim=True))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    wrapper = PeftModel.from_pretrained(tiny.mixtral().double(), tmp_path)
    torch.testing.assert_close(wrapper(IDS).logits, wanted(IDS).logits)


def test_trained_on_and_resumed(tmp_path: Path) -> None:
    experts.write_old_adapter(tmp_path, tiny.mixtral(), "Mixtral", ["q_proj", "w1", "w2", "w3"])
    wrapper = PeftModel.from_pretrained(tiny.mixtral(), tmp_path, is_trainable=True).train()
    optimiser = torch.optim.SGD([p for p in wrapper.parameters() if p.requires_grad], 0.5)
    losses = []
    for _ in range(4):
        loss = wrapper(IDS, labels=IDS).loss
        losses.append(loss.item())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    wrapper.save_pretrained(tmp_path / "on")
    again = PeftModel.from_pretrained(tiny.mixtral(), tmp_path / "on")
    torch.testing.assert_close(again(IDS).logits, wrapper.eval()(IDS).logits)


@pytest.mark.parametrize(
    ("family", "targets", "parameters"),
    [
        ("Mixtral", ["q_proj", "w1", "w2", "w3"], {"gate_up_proj", "down_proj"}),
        ("Mixtral", "all-linear", {"gate_up_proj", "down_proj", "gate.weight"}),
        ("Mixtral", r".*(q_proj|w[123])", {"gate_up_proj", "down_proj"}),
        ("Qwen3Moe", ["q_proj", "gate_proj", "up_proj", "down_proj"], {"gate_up_proj", "down_proj"}),
        ("Qwen2Moe", ["q_proj", "gate"], {"gate.weight"}),
    ],
)
def test_config_of_a_fresh_adapter(family: str, targets: Any, parameters: set[str]) -> None:
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets)
    model = tiny.decoder(family)
    convert_peft_config_for_transformers(config, model, None)
    assert set(config.target_parameters) == parameters
    fresh = get_peft_model(tiny.decoder(family), LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    assert set(fresh.peft_config["default"].target_parameters) == parameters
    if "gate_up_proj" in parameters:
        assert config.rank_pattern == {r".*\.gate_up_proj": 4}
        assert config.alpha_pattern == {r".*\.gate_up_proj": 6}


def test_a_part_alone_is_refused_for_a_fresh_adapter() -> None:
    model = tiny.mixtral()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"gate_up_proj.*w3"):
        get_peft_model(model, LoraConfig(target_modules=["w1"]))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_scales_that_one_parameter_cannot_have(tmp_path: Path) -> None:
    experts.write_old_adapter(tmp_path, tiny.mixtral(), "Mixtral", ["w1", "w3"], ranks={"w1": 2})
    with pytest.raises(ValueError, match="different scales"):
        PeftModel.from_pretrained(tiny.mixtral(), tmp_path)


def test_half_an_expert_is_refused(tmp_path: Path) -> None:
    tensors = experts.write_old_adapter(tmp_path, tiny.mixtral(), "Mixtral", ["w1", "w2", "w3"])
    del tensors["base_model.model.model.layers.0.block_sparse_moe.experts.2.w3.lora_B.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"expert 2 .* one of the two factors of 'w3'"):
        PeftModel.from_pretrained(tiny.mixtral(), tmp_path)


# -- the calls of peft.utils.transformers_weight_conversion, beside the real ones ------------------------------------

REAL = """
import json, sys, copy, tiny, torch
from pathlib import Path
from peft import LoraConfig, PeftConfig
from peft.utils import transformers_weight_conversion as twc
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping
for folder in map(Path, sys.argv[1:]):
    family, changes, targets, options = json.loads((folder / "case.json").read_text())
    model = tiny.decoder(family, **changes)
    config = PeftConfig.from_pretrained(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    mapping = twc.build_peft_weight_mapping(get_model_conversion_mapping(model), "mine", peft_config=config)
    twc.convert_peft_config_for_transformers(config, model, None)
    out = twc.convert_peft_adapter_state_dict_for_transformers(model, config, tensors, "mine")
    save_file({key: value.contiguous() for key, value in out.items()}, folder / "real")
    (folder / "real.json").write_text(json.dumps({
        "targets": sorted(config.target_modules), "parameters": sorted(config.target_parameters),
        "ranks": config.rank_pattern, "alphas": config.alpha_pattern,
        "converters": sorted(str(t) for c in mapping if hasattr(c, "operations") for t in c.target_patterns),
    }))
"""


def test_conversions_as_the_real_peft(tmp_path: Path) -> None:
    """Where the real peft is right, names, shapes, values and configurations are the same."""
    if peftless.peft_python() is None:
        pytest.skip("there is no .venv with the real peft to compare with")
    names = ["mixtral", "router", "down alone", "qwen3"]
    for name in names:
        family, changes, targets, options = CASES[name]
        experts.write_old_adapter(tmp_path / name, tiny.decoder(family, **changes), family, targets, **options)
        (tmp_path / name / "case.json").write_text(json.dumps(CASES[name]))
    peftless.run_with_peft(REAL, *(tmp_path / name for name in names))
    for name in names:
        family, changes, _, _ = CASES[name]
        model, config = tiny.decoder(family, **changes), PeftConfig.from_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        mapping = build_peft_weight_mapping(get_model_conversion_mapping(model), "mine", peft_config=config)
        convert_peft_config_for_transformers(config, model, None)
        real = json.loads((tmp_path / name / "real.json").read_text())
        assert sorted(config.target_modules) == real["targets"]
        assert sorted(config.target_parameters) == real["parameters"]
        assert (config.rank_pattern, config.alpha_pattern) == (real["ranks"], real["alphas"])
        mine = convert_peft_adapter_state_dict_for_transformers(model, config, tensors, "mine")
        theirs = load_file(tmp_path / name / "real")
        assert mine.keys() == theirs.keys()
        for key in theirs:
            assert torch.equal(mine[key], theirs[key]), key
        if name != "down alone":  # the real one names a converter for what is not adapted; nothing matches it
            converters = [str(t) for c in mapping if hasattr(c, "operations") for t in c.target_patterns]
            assert sorted(converters) == real["converters"]


def test_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(3, out, r, generator=generator) for out, r in ((5, 2), (4, 3)))
    flat = FlattenDims((0, 1)).convert({"a": first}, ["a"], ["b"])["a"]
    assert torch.equal(flat, first.reshape(15, 2))
    assert torch.equal(FlattenDims(0).convert({"a": first}, ["a"], ["b"])["a"], first.flatten())
    assert torch.equal(PermuteDims((2, 0, 1)).convert({"a": first}, ["a"], ["b"])["a"], first.permute(2, 0, 1))
    assert repr(FlattenDims((0, 1))) == "FlattenDims(dims=(0, 1))"
    both = {"b": second, "a": first}
    joined = PeftConcatenate(dim=1).convert(both, ["a", "b"], ["c"], full_layer_name="c")["c"]
    assert joined.shape == (9, 15)
    for expert in range(3):
        block = joined.view(9, 5, 3)[:, :, expert]
        assert torch.equal(block, torch.block_diag(first[expert], second[expert]))
    flat = PeftConcatenate(dim=1).convert({"a": first[0], "b": second[0]}, ["a", "b"], ["c"], full_layer_name="c")["c"]
    assert torch.equal(flat, torch.block_diag(first[0], second[0]))
    with pytest.raises(ValueError, match="axes"):
        PeftConcatenate().convert({"a": first, "b": second[0]}, ["a", "b"], ["c"], full_layer_name="c")
    with pytest.raises(ValueError, match="found"):
        PeftConcatenate().convert(both, ["a"], ["c"], full_layer_name="c")
    with pytest.raises(ValueError, match="experts"):
        PeftConcatenate().convert({"a": first, "b": second[:2]}, ["a", "b"], ["c"], full_layer_name="c")
    for step in (FlattenDims(0), PermuteDims((0,)), PeftConcatenate()):
        with pytest.raises(NotImplementedError):
            _ = step.reverse_op
    assert build_peft_weight_mapping([], "any") == []
    assert build_peft_weight_mapping(None, "any") == []


def test_mapping_without_a_config_knows_every_method(tmp_path: Path) -> None:
    model = tiny.mixtral()
    mapping = build_peft_weight_mapping(get_model_conversion_mapping(model), "mine")
    renamings = [one for one in mapping if not hasattr(one, "operations")]

    def renamed(key: str) -> str:
        for one in renamings:
            key = one.rename_source_key(key)[0]
        return key

    above = "base_model.model.model.layers.0"
    assert renamed(f"{above}.self_attn.q_proj.lora_A.weight") == "model.layers.0.self_attn.q_proj.lora_A.mine.weight"
    assert renamed(f"{above}.block_sparse_moe.gate.ia3_l") == "model.layers.0.mlp.gate.ia3_l.mine"
    assert renamed(f"{above}.self_attn.q_proj.hada_w1_a") == "model.layers.0.self_attn.q_proj.hada_w1_a.mine"
    shutil.rmtree(tmp_path)


# -- layers that only have another name now --------------------------------------------------------------------------


def renamed_adapter(folder: Path, model: Any, config: LoraConfig, old: dict[str, str], targets: Any) -> Any:
    """Write an adapter of ``model`` as it was called before: ``old`` says what each part of a path was.

    Returns the model with the adapter in it.
    """
    wrapper = get_peft_model(model, config)
    tiny.scramble(wrapper, scale=0.3)
    tiny.scramble(wrapper, "modules_to_save")
    wrapper.save_pretrained(folder)
    file = folder / "adapter_model.safetensors"
    tensors = {}
    for key, value in load_file(file).items():
        for new, was in old.items():
            key = key.replace(new, was)
        tensors[key] = value
    save_file(tensors, file)
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"target_modules": targets}))
    return wrapper.eval()


@pytest.mark.parametrize("targets", [["query", "value"], r".*attention\.(query|value)"])
def test_vit(targets: Any, tmp_path: Path) -> None:
    """``query`` and ``value`` are ``q_proj`` and ``v_proj`` now."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    old = {"vit.layers": "vit.encoder.layer", "q_proj": "attention.query", "v_proj": "attention.value"}
    model = renamed_adapter(tmp_path, tiny.vit(), config, old, targets)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "q_proj" in key]
    want = model(images).logits
    wrapper = PeftModel.from_pretrained(tiny.vit(), tmp_path)
    torch.testing.assert_close(wrapper(images).logits, want)
    assert set(wrapper.peft_config["default"].target_modules) == {"q_proj", "v_proj"}
    mixed = tiny.vit()
    report = mixed.load_adapter(str(tmp_path))
    assert not report.missing_keys
    assert not report.unexpected_keys
    torch.testing.assert_close(mixed(images).logits, want)


def test_fresh_adapter_by_earlier_names() -> None:
    config = LoraConfig(r=3, target_modules=["query", "value"], rank_pattern={"value": 2})
    model = get_peft_model(tiny.vit(), config)
    ranks = {name: p.shape[0] for name, p in model.named_parameters() if "lora_A" in name}
    assert len(ranks) == 4
    assert {rank for name, rank in ranks.items() if ".q_proj." in name} == {3}
    assert {rank for name, rank in ranks.items() if ".v_proj." in name} == {2}
    with pytest.raises(ValueError, match="matches nothing"):
        get_peft_model(tiny.vit(), LoraConfig(target_modules=["querry"]))


def test_llava(tmp_path: Path) -> None:
    """The language model moved from ``language_model.model`` to ``model.language_model``."""
    config = LoraConfig(r=3, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    old = {"model.model.language_model.": "model.language_model.model."}
    model = renamed_adapter(tmp_path, tiny.llava(), config, old, ["q_proj", "v_proj"])
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    pattern = r"language_model.*\.(q_proj|v_proj)"
    for targets in (pattern, r".*language_model.*\.(q_proj|v_proj)"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(saved | {"target_modules": targets}))
        want = model(IDS[:, :5]).logits
        torch.testing.assert_close(PeftModel.from_pretrained(tiny.llava(), tmp_path)(IDS[:, :5]).logits, want)
    mixed = tiny.llava()
    mixed.load_adapter(str(tmp_path))
    torch.testing.assert_close(mixed(IDS[:, :5]).logits, want)


@pytest.mark.parametrize("how", ["eager", "batched_mm", "grouped_mm"])
def test_every_way_to_run_experts(how: str, tmp_path: Path) -> None:
    experts.write_old_adapter(tmp_path, tiny.mixtral(), "Mixtral", ["q_proj", "w1", "w2", "w3", "gate"])
    want = experts.merged_by_hand(tiny.mixtral(), "Mixtral", tmp_path)(IDS).logits
    model = tiny.mixtral()
    model.set_experts_implementation(how)
    wrapper = PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    logits = wrapper.eval()(IDS).logits
    torch.testing.assert_close(logits.double(), want, rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    trained = {name: p for name, p in wrapper.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
