"""What saving and training must do, at full size where size is the point."""

from __future__ import annotations

import dataclasses
import json

import full_size
import pytest
import tiny_models
import torch

import inlay
from inlay import LoraConfig, PeftModel, get_peft_model

CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["c_attn", "c_proj"], "lora_dropout": 0.1}


@pytest.fixture(scope="module")
def gpt2():
    """GPT-2 with the adapter of the claims, changed from its initial values."""
    model = get_peft_model(full_size.gpt2(meta=False), LoraConfig(**CONFIG, task_type="CAUSAL_LM"))
    tiny_models.perturb(model, "default", scale=0.02)
    return model.eval()


def test_only_adapter_tensors_are_saved(gpt2, tmp_path):
    """Claims 12 and 17: 3.2 MB for 811,008 parameters, 1/153 of the model; names without the adapter's."""
    from safetensors.torch import load_file

    gpt2.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    assert sum(tensor.numel() for tensor in tensors.values()) == 811_008
    assert 811_008 * 4 < weights.stat().st_size < 811_008 * 4 + 20_000
    assert round(weights.stat().st_size / 1e6, 2) in (3.24, 3.25)
    assert round(sum(p.numel() * 4 for p in full_size.gpt2().parameters()) / weights.stat().st_size) == 153
    assert len(tensors) == 72
    assert all(key.startswith("base_model.model.transformer.h.") for key in tensors)
    assert not any("default" in key for key in tensors)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert sorted(config["target_modules"]) == CONFIG["target_modules"]


def test_an_adapter_is_loaded_under_another_name(gpt2, tmp_path):
    """Claim 17: and its output is the same, on a fresh base."""
    gpt2.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(full_size.gpt2(meta=False), tmp_path, adapter_name="other")
    assert loaded.active_adapter == "other"
    tokens = torch.randint(0, 50257, (1, 8))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, gpt2(tokens).logits)


def test_names_persist_through_save_and_load(tmp_path):
    """Claim 17: of several adapters."""
    model = get_peft_model(tiny_models.gpt2(), LoraConfig(**CONFIG), adapter_name="task_A")
    model.add_adapter("task_B", LoraConfig(r=16, target_modules=["c_attn"]))
    model.active_adapters = ["task_B", "task_A"]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_models.gpt2(), tmp_path, adapters="all")
    assert list(loaded.peft_config.keys()) == ["task_A", "task_B"]
    assert loaded.active_adapters == ["task_B", "task_A"]


def test_a_hundred_adapters_on_one_base():
    """Claim 18: size is one base and the sum of adapters; any is switched on without reloading the base."""
    base = tiny_models.gpt2()
    size = full_size.numel(base)
    pointers = {name: p.data_ptr() for name, p in base.named_parameters()}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]), adapter_name="n0")
    one = model.get_nb_trainable_parameters()[0]
    for number in range(1, 100):
        model.add_adapter(f"n{number}", LoraConfig(r=2, target_modules=["c_attn"]))
        tiny_models.perturb(model, f"n{number}", seed=number)
    assert model.get_nb_trainable_parameters()[1] == size + 100 * one
    outputs = set()
    for number in (0, 57, 99):
        model.set_adapter(f"n{number}")
        with torch.no_grad():
            outputs.add(model(tiny_models.tokens()).logits.sum().item())
    assert len(outputs) == 3
    held = {name.replace(".base_layer", ""): p.data_ptr() for name, p in base.named_parameters() if "lora_" not in name}
    assert held == pointers


def test_every_field_is_documented_and_the_count_is_predicted():
    """Claim 19: 35 fields with type, default, effect and effect on the count, which a plan predicts exactly."""
    import peft

    def default(field):
        value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value

    common = {field.name for field in dataclasses.fields(inlay.PeftConfig)}
    further = {*common, *LoraConfig.beyond}  # PEFT has no scope
    own = [field for field in dataclasses.fields(LoraConfig) if field.name not in further]
    theirs = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert len(own) == 35
    for field in own:
        assert field.metadata["doc"], field.name
        assert field.type, field.name
        assert default(field) == default(theirs[field.name]), field.name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 3, "rank_pattern": {"h.1.attn.c_attn": 7}},
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["ln_f"]},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"layers_to_transform": [1]},
        {"target_modules": ["c_attn", "wte"]},
        {"exclude_modules": ["mlp.c_proj"]},
        {"trainable_token_indices": [1, 5, 9]},
    ],
    ids=str,
)
def test_the_count_of_a_configuration_is_predicted(fields):
    """Claim 19: without building it."""
    config = {**CONFIG, **fields}
    predicted = inlay.plan(tiny_models.gpt2().config, LoraConfig(**config, task_type="CAUSAL_LM")).trainable
    built = get_peft_model(tiny_models.gpt2(), LoraConfig(**config, task_type="CAUSAL_LM"))
    assert predicted == built.get_nb_trainable_parameters()[0]


def test_a_custom_loop_trains_and_the_model_generates():
    """Claim 20: transformers' Trainer is in tests/models/test_trainer.py."""
    model = get_peft_model(tiny_models.gpt2().train(), LoraConfig(**CONFIG, task_type="CAUSAL_LM"))
    x = tiny_models.tokens(8, 8)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.03)
    losses = []
    for _ in range(20):
        loss = model(x, labels=x).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.2
    model.eval()
    assert model.generate(x[:1, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 8)


def test_the_script_of_the_description(tmp_path, capsys):
    """Claims 8 to 20 in one run: PEFT's script on the full GPT-2 with only the import changed."""
    base = full_size.gpt2(meta=False)
    original = base.transformer.h[0].attn.c_attn
    pointer = original.weight.data_ptr()

    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    layer = base.transformer.h[0].attn.c_attn
    assert layer.base_layer is original
    assert layer.base_layer.weight.data_ptr() == pointer
    assert tuple(layer.lora_A["default"].weight.shape) == (8, 768)
    assert tuple(layer.lora_B["default"].weight.shape) == (2304, 8)
    assert layer.scaling["default"] == 2.0

    model.print_trainable_parameters()
    assert capsys.readouterr().out == ("trainable params: 811,008 || all params: 125,250,816 || trainable%: 0.6475\n")
    assert model.num_parameters(only_trainable=True) == 811_008

    model.add_adapter("task_B", LoraConfig(r=16, target_modules=["c_attn"], init_lora_weights=False))
    model.active_adapters = ["default", "task_B"]
    tokens = torch.randint(0, 50257, (1, 6))
    model.eval()
    with torch.no_grad():
        both = model(tokens).logits
        model.set_adapter("default")
        assert not torch.allclose(both, model(tokens).logits, atol=1e-4)
    tiny_models.perturb(model, "default", scale=0.02)
    with torch.no_grad():
        expected = model(tokens).logits

    model.save_pretrained(tmp_path / "my_adapter")
    fresh_base = full_size.gpt2(meta=False)
    weights = {name: p.detach().clone() for name, p in fresh_base.named_parameters()}
    modules = {name: id(module) for name, module in fresh_base.named_modules()}
    model = PeftModel.from_pretrained(fresh_base, tmp_path / "my_adapter")
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, expected)
    ejected = model.unload()
    assert ejected is fresh_base
    assert {name: id(module) for name, module in ejected.named_modules()} == modules
    assert all(torch.equal(p, weights[name]) for name, p in ejected.named_parameters())

    model = PeftModel.from_pretrained(ejected, tmp_path / "my_adapter")
    merged = model.merge_and_unload()
    assert merged is fresh_base
    assert {name: id(module) for name, module in merged.named_modules()} == modules
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
