"""What goes in through hooks beside plain layers, as PEFT has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import BOTH, OURS, Net, fill, inputs, run

SOURCE = """
import peft
from peft import *


class Mine(LoraModel):
    def _prepare_model(self, peft_config, model):
        return super()._prepare_model(peft_config, model)
"""


def llama(tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, tie_word_embeddings=tie))


def made(root, model, **options):
    world = run(SOURCE, root)
    tuner = world.Mine(model, world.LoraConfig(**options), "default")
    fill(tuner)
    return tuner


def logits(tuner):
    return tuner(torch.arange(6)[None]).logits


def alike(build, **options):
    theirs, ours = (made(root, build(), **options) for root in BOTH)
    assert sorted(theirs.state_dict()) == sorted(ours.state_dict())
    flags = [{name: p.requires_grad for name, p in one.named_parameters()} for one in (theirs, ours)]
    assert flags[0] == flags[1]
    assert theirs.targeted_module_names == ours.targeted_module_names
    assert theirs.targeted_parameter_names == ours.targeted_parameter_names
    return theirs, ours


def test_replicated_blocks():
    theirs, ours = alike(llama, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def test_parameters():
    theirs, ours = alike(llama, target_modules=[], target_parameters=["q_proj.weight"])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)


def test_default_targets_of_a_family():
    alike(llama)


def test_full_copies_and_token_rows():
    theirs, ours = (
        made(root, llama(), target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
        for root in BOTH
    )
    trained = [sorted(n for n, p in one.named_parameters() if p.requires_grad) for one in (theirs, ours)]
    assert trained[0] == trained[1]


def test_tied_layers_share_one_set_of_tensors_here():
    theirs, ours = (
        made(root, llama(True), target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True) for root in BOTH
    )
    assert any("lm_head.lora_A" in name for name, _ in theirs.named_parameters())
    assert not any("lm_head.lora_A" in name for name, _ in ours.named_parameters())
    engine = run(SOURCE, OURS)
    config = engine.LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    same = engine.LoraModel(llama(True), config, "default")
    fill(same)
    torch.testing.assert_close(logits(ours), logits(same))


@pytest.mark.parametrize("root", BOTH)
def test_attention_is_adapted_with_its_output(root):
    tuner = made(root, nn.Sequential(nn.MultiheadAttention(4, 2)), target_modules=["0"])
    names = sorted(name.removeprefix("model.0.") for name, _ in tuner.named_parameters() if "lora" in name)
    assert names == [
        "base_layer.out_proj.lora_A.default.weight",
        "base_layer.out_proj.lora_B.default.weight",
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


def test_a_module_at_two_places_is_adapted_at_both_here():
    def shared():
        model = Net()
        model.again = model.first
        return model

    theirs, ours = (made(root, shared(), target_modules=["first"]) for root in BOTH)
    assert theirs.model.first is not theirs.model.again
    assert ours.model.first is ours.model.again


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["nothing"]},
        {"target_modules": ["block"]},
        {"target_modules": ["first"], "exclude_modules": ["first"]},
        {},
    ],
)
def test_what_cannot_be_is_a_value_error_and_changes_nothing(options):
    for root in BOTH:
        with pytest.raises(ValueError):
            made(root, Net(), **options)
    model = Net()
    kept = [id(module) for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError):
        made(OURS, model, **options)
    assert [id(module) for module in model.modules()] == kept
    assert [p.requires_grad for p in model.parameters()] == flags
    torch.testing.assert_close(model(inputs()), Net()(inputs()))


def test_what_a_failed_replication_changed_is_put_back():
    model = llama()
    with pytest.raises(ValueError):
        made(OURS, model, target_modules=["nothing"], layer_replication=[(0, 2), (0, 2)])
    assert len(model.model.layers) == 2
    assert model.config.num_hidden_layers == 2
    logits(model)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("root", BOTH)
def test_patterns_that_mean_nothing_warn(root, field):
    with pytest.warns(RuntimeWarning, match=field):
        made(root, Net(), target_modules=["first"], **{field: {"second": 3}})


@pytest.mark.parametrize("root", BOTH)
def test_two_adapters_that_train_biases_are_refused(root):
    tuner = made(root, Net(), target_modules=["first"], bias="all")
    world = run(SOURCE, root)
    tuner.peft_config["b"] = world.LoraConfig(target_modules=["first"], bias="lora_only")
    with pytest.raises(ValueError, match="bias"):
        tuner.inject_adapter(tuner.model, "b")
