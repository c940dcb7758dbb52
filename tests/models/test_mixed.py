"""Adapters of different methods on one model."""

from __future__ import annotations

import itertools

import pytest
import tiny_models
import torch

import inlay
from inlay import IA3Config, LoHaConfig, LoraConfig, PeftMixedModel, VeraConfig, get_peft_model
from inlay.core.policy import PEFT
from inlay.errors import UnsupportedError
from inlay.models.entry import wrap

X = tiny_models.tokens()
CONFIGS = {
    "lora": LoraConfig(target_modules=["c_attn", "c_proj"], r=4),
    "dora": LoraConfig(target_modules=["c_attn"], r=2, use_dora=True),
    "ia3": IA3Config(target_modules=["c_attn"], feedforward_modules=[]),
    "loha": LoHaConfig(target_modules=["c_attn", "c_fc"], r=2),
    "vera": VeraConfig(target_modules=["c_attn", "c_fc"], r=4),
}


def mixed(names=tuple(CONFIGS)):
    first, *rest = names
    model = get_peft_model(tiny_models.gpt2(), CONFIGS[first], adapter_name=first, mixed=True)
    for name in rest:
        model.add_adapter(name, CONFIGS[name])
    for seed, name in enumerate(names):
        tiny_models.perturb(model, name, seed=seed)
    return model


def logits(model):
    with torch.no_grad():
        return model(X).logits


def test_all_methods_at_once():
    model = mixed()
    assert type(model) is PeftMixedModel
    assert type(model.base_model).__name__ == "MixedModel"
    assert model.active_adapter == model.active_adapters == ["lora"]
    outputs = []
    for count in range(1, len(CONFIGS) + 1):
        model.set_adapter(list(CONFIGS)[:count])
        outputs.append(logits(model))
    for before, after in itertools.pairwise(outputs):
        assert not torch.allclose(before, after, atol=1e-5)
    model.train()
    model(X, labels=X).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def test_merging_keeps_the_output_and_the_order_counts():
    model = mixed(("lora", "dora", "ia3"))
    model.set_adapter(["lora", "dora", "ia3"])
    before = logits(model)
    model.set_adapter(["ia3", "dora", "lora"])
    assert not torch.allclose(logits(model), before, atol=1e-5)
    model.set_adapter(["lora", "dora", "ia3"])
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrapper", [PeftMixedModel, inlay.PeftModel])
def test_saving_and_loading(tmp_path, wrapper):
    """PEFT can do neither."""
    model = mixed()
    model.set_adapter(["vera", "lora"])
    model.save_pretrained(tmp_path)
    loaded = wrapper.from_pretrained(tiny_models.gpt2(), tmp_path / "lora", adapter_name="lora")
    assert isinstance(loaded, wrapper)
    everything = wrapper.from_pretrained(tiny_models.gpt2(), tmp_path, adapters="all")
    assert type(everything) is wrapper
    assert everything.active_adapters == ["vera", "lora"]
    torch.testing.assert_close(logits(everything), logits(model), rtol=0, atol=0)


def test_status_and_figures_work():
    model = mixed()
    status = model.get_model_status()
    assert status.peft_types == {"lora": "LORA", "dora": "LORA", "ia3": "IA3", "loha": "LOHA", "vera": "VERA"}
    assert status.adapter_model_type == "MixedModel"
    assert model.get_nb_trainable_parameters()[0] == status.trainable_params > 0


def test_several_adapters_are_deleted_at_once():
    model = mixed(("lora", "ia3", "loha"))
    with pytest.raises(inlay.InlayError):
        model.delete_adapter(["ia3", "nobody"])
    assert list(model.peft_config) == ["lora", "ia3", "loha"]
    model.delete_adapter(["ia3", "loha"])
    assert list(model.peft_config) == ["lora"]


def test_a_plain_model_takes_any_method_unless_the_policy_is_pefts():
    plain = get_peft_model(tiny_models.gpt2(), CONFIGS["lora"])
    plain.add_adapter("ia3", CONFIGS["ia3"])
    assert list(plain.peft_config) == ["default", "ia3"]
    strict = wrap(tiny_models.gpt2(), CONFIGS["lora"], "default", policy=PEFT)
    with pytest.raises(UnsupportedError, match="mixed=True"):
        strict.add_adapter("ia3", CONFIGS["ia3"])
    assert list(strict.peft_config) == ["default"]
    wrap(tiny_models.gpt2(), CONFIGS["lora"], "default", policy=PEFT, mixed=True).add_adapter("ia3", CONFIGS["ia3"])


def test_under_pefts_policy_activation_unfreezes_what_was_loaded(tmp_path):
    get_peft_model(tiny_models.gpt2(), CONFIGS["lora"]).save_pretrained(tmp_path)
    from inlay.core.policy import INLAY
    from inlay.models.loading import LoadOptions

    for policy, trained in ((INLAY, False), (PEFT, True)):
        loaded = inlay.PeftModel.loaded(tiny_models.gpt2(), tmp_path, "default", policy, None, LoadOptions())
        assert loaded.get_nb_trainable_parameters()[0] == 0
        loaded.set_adapter("default")
        assert (loaded.get_nb_trainable_parameters()[0] > 0) is trained
