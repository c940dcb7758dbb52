"""Saving and loading through the wrapper; formats and keys are tested with the checkpoints."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch

import inlay
from inlay import LoraConfig, PeftModel, get_peft_model
from inlay.errors import CheckpointError, CheckpointMismatchError, ConfigError, UnknownFieldError, UnsupportedError

X = tiny_models.tokens()


def lora(**fields):
    return LoraConfig(**({"r": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"} | fields))


@pytest.fixture
def model():
    wrapped = get_peft_model(tiny_models.gpt2(), lora())
    wrapped.add_adapter("b", lora(r=2, target_modules=["c_proj"], modules_to_save=["ln_f"]))
    wrapped.add_adapter("scale", inlay.IA3Config(target_modules=["c_attn"], feedforward_modules=[]))
    for seed, name in enumerate(wrapped.peft_config):
        tiny_models.perturb(wrapped, name, seed=seed)
    return wrapped


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def logits(model, *names):
    if names:
        model.set_adapter(list(names))
    with torch.no_grad():
        return model(X).logits


def snapshot(base):
    tensors = {name: value.clone() for name, value in base.state_dict().items()}
    grads = {name: p.requires_grad for name, p in base.named_parameters()}
    return tensors, grads, {name: id(m) for name, m in base.named_modules()}, base.training, set(base.__dict__)


def assert_unchanged(base, before):
    after = snapshot(base)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())


def test_loading_for_inference(model, saved):
    base = tiny_models.gpt2().train()
    loaded = PeftModel.from_pretrained(base, saved)
    assert type(loaded) is inlay.PeftModelForCausalLM
    assert not loaded.training
    assert not base.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.peft_config["default"].inference_mode
    assert torch.equal(logits(loaded), logits(model, "default"))


def test_loading_for_training(model, saved):
    base = tiny_models.gpt2().train()
    loaded = PeftModel.from_pretrained(base, saved, is_trainable=True)
    assert loaded.training
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, _ in loaded.named_parameters() if "lora_" in n
    }
    assert not loaded.peft_config["default"].inference_mode


@pytest.mark.parametrize("low_memory", [False, True])
def test_another_name_and_later_adapters(model, saved, low_memory):
    loaded = PeftModel.from_pretrained(tiny_models.gpt2(), saved, adapter_name="x", low_cpu_mem_usage=low_memory)
    assert loaded.active_adapters == ["x"]
    result = loaded.load_adapter(saved / "b", "y", is_trainable=True, low_cpu_mem_usage=low_memory)
    assert result.missing_keys == result.unexpected_keys == []
    loaded.load_adapter(saved, "z", subfolder="scale", low_cpu_mem_usage=low_memory)
    assert loaded.active_adapters == ["x"]
    assert loaded.get_model_status().requires_grad == {"x": False, "y": True, "z": False}
    assert not any(p.is_meta for p in loaded.parameters())
    for ours, theirs in (("x", "default"), ("y", "b"), ("z", "scale")):
        assert torch.equal(logits(loaded, ours), logits(model, theirs))


def test_all_adapters_come_back_as_they_were(model, saved):
    model.set_adapter(["scale", "default"])
    for layer in model.state.layers():
        if "default" in getattr(layer, "entries", {}):
            layer.scaling["default"] = 0.125
    expected = logits(model)
    model.save_pretrained(saved)
    loaded = PeftModel.from_pretrained(tiny_models.gpt2(), saved, adapters="all")
    assert list(loaded.peft_config) == ["default", "b", "scale"]
    assert loaded.active_adapters == ["scale", "default"]
    assert torch.equal(logits(loaded), expected)
    assert loaded.get_nb_trainable_parameters()[0] == 0
    assert not loaded.training


def test_an_adapter_that_is_known_is_loaded_into_again(model, saved):
    before = logits(model, "default")
    tiny_models.perturb(model, "default", seed=9)
    assert not torch.equal(logits(model, "default"), before)
    model.load_adapter(saved, "default", is_trainable=True)
    assert torch.equal(logits(model, "default"), before)


def test_a_config_of_ones_own(model, saved):
    config = inlay.PeftConfig.from_pretrained(saved)
    config.lora_alpha = 0
    loaded = PeftModel.from_pretrained(tiny_models.gpt2(), saved, config=config)
    assert torch.equal(logits(loaded), logits(tiny_models.gpt2()))


def test_keys_can_be_mapped(model, saved):
    renamed = tiny_models.gpt2()
    renamed.body = renamed.transformer
    del renamed.transformer
    renamed.forward = None
    with pytest.raises(CheckpointMismatchError):
        PeftModel.from_pretrained(renamed, saved)
    loaded = PeftModel.from_pretrained(renamed, saved, key_mapping={"^transformer": "body"})
    values = {name.replace("body", "transformer"): p for name, p in loaded.named_parameters() if "lora_" in name}
    assert values
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in values.items())


FAULTS = {
    "no such folder": (CheckpointError, lambda folder: folder / "nowhere", {}),
    "unknown keyword": (UnknownFieldError, lambda folder: folder, {"is_trainabel": True}),
    "keyword for offloading": (UnsupportedError, lambda folder: folder, {"device_map": "auto"}),
    "other adapters than all": (ConfigError, lambda folder: folder, {"adapters": "some"}),
    "cut off": (CheckpointError, "cut", {}),
    "not an adapter": (CheckpointError, "config", {}),
    "another architecture": (CheckpointMismatchError, "shape", {}),
    "a key too many": (CheckpointMismatchError, "more", {}),
    "a key too few": (CheckpointMismatchError, "fewer", {}),
    "all, the last one damaged": (CheckpointError, "last", {"adapters": "all"}),
}


def damaged(folder, how):
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif how == "config":
        (folder / "adapter_config.json").write_text("[]")
    elif how == "last":
        (folder / "scale" / "adapter_model.safetensors").write_bytes(b"nonsense")
    else:
        tensors = load_file(weights)
        key = next(iter(tensors))
        if how == "shape":
            tensors[key] = tensors[key][:, :-1].contiguous()
        elif how == "more":
            tensors["base_model.model.extra.lora_A.weight"] = torch.ones(1)
        else:
            del tensors[key]
        save_file(tensors, weights)
    return folder


@pytest.mark.parametrize(("error", "where", "keywords"), FAULTS.values(), ids=FAULTS)
def test_a_failed_load_leaves_the_model_as_it_was(saved, error, where, keywords):
    base = tiny_models.gpt2().train()
    before = snapshot(base)
    folder = damaged(saved, where) if isinstance(where, str) else where(saved)
    with pytest.raises(error):
        PeftModel.from_pretrained(base, folder, **keywords)
    assert_unchanged(base, before)


@pytest.mark.parametrize("how", ["cut", "config", "shape", "more", "fewer"])
def test_a_failed_load_adapter_leaves_the_model_as_it_was(model, saved, how):
    base = model.get_base_model()
    before = snapshot(base)
    damaged(saved, how)
    with pytest.raises(CheckpointError):
        model.load_adapter(saved, "new")
    assert_unchanged(base, before)
    assert list(model.peft_config) == ["default", "b", "scale"]
    with pytest.raises(CheckpointError):
        model.load_adapter(saved, "default")
    assert_unchanged(base, before)


def test_what_saving_refuses(model, tmp_path):
    with pytest.raises(UnknownFieldError, match="Did you mean 'state_dict'"):
        model.save_pretrained(tmp_path, state_dct={})
    with pytest.raises(FileNotFoundError):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    with pytest.raises(ValueError, match="nobody"):
        model.save_pretrained(tmp_path, selected_adapters=["nobody"])
    assert list(tmp_path.iterdir()) == []


def test_the_card_keeps_what_was_written(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\nMy words.\n")
    model.create_or_update_model_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "My words." in card
    assert "license: mit" in card
    assert "library_name: peft" in card


def test_push_to_hub_uploads_what_would_be_saved(model, monkeypatch):
    import inlay.config.hub as hub

    seen = {}

    def fake(folder, repo_id, **keywords):
        from pathlib import Path

        seen.update(repo=repo_id, files=sorted(p.name for p in Path(folder).rglob("*") if p.is_file()), **keywords)
        return "commit"

    monkeypatch.setattr(hub, "push_folder", fake)
    assert model.push_to_hub("someone/adapter", private=True) == "commit"
    assert seen["repo"] == "someone/adapter"
    assert seen["private"] is True
    assert seen["files"].count("adapter_model.safetensors") == 3


# -- auto classes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path):
    """A base model's folder, and an adapter's that names it."""
    base = tiny_models.gpt2()
    base.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(type(base).from_pretrained(tmp_path / "base"), lora())
    tiny_models.perturb(wrapped, "default")
    assert wrapped.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", wrapped.eval()


@pytest.mark.parametrize("cls", [inlay.AutoPeftModel, inlay.AutoPeftModelForCausalLM])
def test_auto_models_find_their_base(published, cls):
    folder, wrapped = published
    loaded = cls.from_pretrained(folder, adapter_name="x", is_trainable=True, dtype=torch.float32)
    assert type(loaded) is inlay.PeftModelForCausalLM
    assert loaded.active_adapters == ["x"]
    assert torch.equal(logits(loaded.eval()), logits(wrapped))


def test_auto_models_of_another_task_refuse(published):
    with pytest.raises(ConfigError, match="CAUSAL_LM"):
        inlay.AutoPeftModelForTokenClassification.from_pretrained(published[0])
    with pytest.raises(OSError, match="from_pretrained"):
        inlay.AutoPeftModel()


def test_without_a_task_the_class_is_recorded(tmp_path):
    tiny_models.gpt2().save_pretrained(tmp_path / "base")
    base = type(tiny_models.gpt2()).from_pretrained(tmp_path / "base")
    get_peft_model(base, lora(task_type=None)).save_pretrained(tmp_path / "adapter")
    loaded = inlay.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    assert type(loaded) is PeftModel
    assert type(loaded.get_base_model()) is type(base)


@pytest.mark.parametrize(("module", "name"), [("os", "system"), ("transformers", "logging"), ("subprocess", "Popen")])
def test_a_file_cannot_have_anything_else_imported(published, module, name):
    path = published[0] / "adapter_config.json"
    content = json.loads(path.read_text()) | {"task_type": None}
    content["auto_mapping"] = {"base_model_class": name, "parent_library": module}
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=name):
        inlay.AutoPeftModel.from_pretrained(published[0])


def test_a_config_without_a_base_is_refused(saved):
    with pytest.raises(CheckpointError, match="names no base model"):
        inlay.AutoPeftModel.from_pretrained(saved)
