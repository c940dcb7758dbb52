"""The wrapper forwards like the model, and its adapters come and go without a trace."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import tiny_models
import torch
from torch import nn

import inlay
from inlay import LoraConfig, get_peft_model
from inlay.errors import AdapterNameError, RoutingError, StateError, TargetError, UnknownAdapterError, UnsupportedError


@pytest.fixture
def model():
    wrapped = get_peft_model(tiny_models.gpt2(), lora())
    tiny_models.perturb(wrapped, "default")
    return wrapped


def lora(**fields):
    return LoraConfig(**({"r": 4, "target_modules": ["c_attn"], "task_type": "CAUSAL_LM"} | fields))


def logits(model, x, **kwargs):
    with torch.no_grad():
        return model(x, **kwargs).logits


def structure(model: nn.Module) -> dict:
    """Everything that adding an adapter may touch."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "tensors": {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {key for key in model.__dict__ if not key.startswith("__")},
    }


def assert_same_structure(model: nn.Module, before: dict) -> None:
    after = structure(model)
    assert after["modules"] == before["modules"]
    assert after["grad"] == before["grad"]
    assert after["training"] == before["training"]
    assert after["attributes"] == before["attributes"]
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, value) in after["tensors"].items():
        assert identity == before["tensors"][name][0]
        assert torch.equal(value, before["tensors"][name][1]), name


# -- forwarding -------------------------------------------------------------------------------------------------------


def test_attributes_are_the_models(model):
    base = model.get_base_model()
    assert model.base_model.model is base
    assert model.config is base.config
    assert model.generation_config is base.generation_config
    assert model.device == base.device
    assert model.dtype == base.dtype
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.num_parameters(only_trainable=True) == model.get_nb_trainable_parameters()[0] > 0
    assert model.transformer is base.transformer
    with pytest.raises(AttributeError, match="'GPT2LMHeadModel' object has no attribute 'nonsense'"):
        _ = model.nonsense


def test_forward_equals_the_bare_models(model):
    x = tiny_models.tokens()
    base = model.get_base_model()
    assert torch.equal(logits(model, x), logits(base, x))
    assert torch.equal(model(x, labels=x).loss, base(x, labels=x).loss)


def test_a_wrapper_is_not_wrapped_again(model):
    with pytest.raises(StateError, match="add_adapter"):
        get_peft_model(model, lora())


def test_a_model_without_transformers():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    before = net(x)
    wrapped = get_peft_model(net, LoraConfig(target_modules=["0", "2"]))
    assert type(wrapped) is inlay.PeftModel
    assert torch.equal(wrapped(x), before)
    assert wrapped.active_adapter == "default"


def test_an_assigned_generation_config_reaches_the_model(model):
    changed = copy.deepcopy(model.generation_config)
    changed.max_new_tokens = 3
    model.generation_config = changed
    assert model.generate(tiny_models.tokens(1, 4), do_sample=False, eos_token_id=63).shape[1] <= 7


# -- active adapters --------------------------------------------------------------------------------------------------


def test_active_adapters_are_read_and_assigned(model):
    x = tiny_models.tokens()
    one = logits(model, x)
    model.add_adapter("b", lora(r=8, target_modules=["c_proj"]))
    tiny_models.perturb(model, "b")
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, x), one)  # what is added is not active
    model.active_adapters = ["default", "b"]
    assert model.active_adapters == ["default", "b"] == model.active_adapter
    both = logits(model, x)
    model.active_adapter = "b"
    assert model.active_adapter == "b"
    other = logits(model, x)
    assert len({one.sum().item(), both.sum().item(), other.sum().item()}) == 3
    model.set_adapter("default")
    assert torch.equal(logits(model, x), one)


def test_only_what_is_active_trains(model):
    model.add_adapter("b", lora())
    model.add_adapter("c", lora())

    def training():
        return {name for name, flag in model.get_model_status().requires_grad.items() if flag}

    assert training() == {"default"}
    model.set_adapter(["b", "c"])
    assert training() == {"b", "c"}
    model.set_adapter("b", inference_mode=True)
    assert training() == set()
    model.set_requires_grad(["c"])
    assert training() == {"c"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)


def test_a_config_for_inference_stays_frozen():
    wrapped = get_peft_model(tiny_models.gpt2(), lora(inference_mode=True))
    assert wrapped.get_nb_trainable_parameters()[0] == 0
    wrapped.set_adapter("default")
    assert wrapped.get_nb_trainable_parameters()[0] == 0
    wrapped.set_requires_grad("default")
    assert wrapped.get_nb_trainable_parameters()[0] > 0


def test_deleting_the_active_adapter_falls_back_with_a_warning(model):
    model.add_adapter("b", lora())
    with pytest.warns(inlay.InlayWarning, match="'b' is active now"):
        model.delete_adapter("default")
    assert model.active_adapters == ["b"]
    assert list(model.peft_config) == ["b"]
    assert not [name for name in model.state_dict() if "default" in name]


def test_deleting_the_last_adapter_leaves_the_bare_model():
    base = tiny_models.gpt2()
    before = {name: id(module) for name, module in base.named_modules()}
    wrapped = get_peft_model(base, lora())
    wrapped.delete_adapter("default")
    assert {name: id(module) for name, module in base.named_modules()} == before
    assert wrapped.active_adapters == []
    with pytest.raises(StateError):
        _ = wrapped.active_peft_config


def test_peft_config_writes_through(model):
    replaced = lora(r=4, lora_alpha=99)
    model.peft_config["default"] = replaced
    assert model.active_peft_config is replaced
    assert model.get_base_model().peft_config["default"] is replaced
    with pytest.raises(StateError, match="add_adapter"):
        model.peft_config["other"] = replaced


# -- nothing half-done ----------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown target": (TargetError, lora(target_modules=["c_attn", "q_prj"])),
    "nothing matches": (TargetError, lora(target_modules=["zz"])),
    "no layer to adapt": (TargetError, lora(target_modules=["c_attn", "attn_dropout"])),
    "a rank for nowhere": (TargetError, lora(rank_pattern={"nowhere": 3})),
    "a copy of nothing": (TargetError, lora(modules_to_save=["nowhere"])),
}


@pytest.mark.parametrize(("error", "config"), MISTAKES.values(), ids=MISTAKES)
def test_a_failed_first_adapter_leaves_the_model_as_it_was(error, config):
    base = tiny_models.gpt2()
    before = structure(base)
    with pytest.raises(error):
        get_peft_model(base, config)
    assert_same_structure(base, before)


@pytest.mark.parametrize(("error", "config"), MISTAKES.values(), ids=MISTAKES)
def test_a_failed_further_adapter_leaves_the_model_as_it_was(model, error, config):
    before = structure(model)
    with pytest.raises(error):
        model.add_adapter("b", config)
    assert_same_structure(model, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["default", "", "a.b", "a/b", "__base__", 3])
def test_names_that_cannot_be(model, name):
    before = structure(model)
    with pytest.raises(AdapterNameError):
        model.add_adapter(name, lora())
    assert_same_structure(model, before)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda model: model.set_adapter("defualt"),
        lambda model: model.delete_adapter("defualt"),
        lambda model: model.set_requires_grad("defualt"),
        lambda model: model.merge_adapter(["defualt"]),
        lambda model: model.supports_lora_conversion("defualt"),
        lambda model: model(tiny_models.tokens(), adapter_names=["default", "defualt", "default"]),
        lambda model: setattr(model, "active_adapters", ["default", "defualt"]),
    ],
)
def test_an_unknown_adapter_is_named_with_the_nearest(model, misuse):
    before = structure(model)
    with pytest.raises(UnknownAdapterError, match="Did you mean 'default'"):
        misuse(model)
    assert_same_structure(model, before)
    assert model.active_adapters == ["default"]


# -- calls ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(model):
    model.add_adapter("b", lora(r=8, target_modules=["c_attn", "c_proj"]))
    tiny_models.perturb(model, "b")
    return model


def alone(model, name, row):
    if name == "__base__":
        with model.disable_adapter():
            return logits(model, row)
    model.set_adapter(name)
    return logits(model, row)


def test_adapter_names_by_sample(two):
    x = tiny_models.tokens(4)
    names = ["b", "__base__", "default", "b"]
    mixed = logits(two, x, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row : row + 1], alone(two, name, x[row : row + 1]), rtol=1e-5, atol=1e-5)


def test_adapter_names_by_sample_in_training(two):
    """PEFT refuses this; each adapter gets the gradient of its own samples."""
    x = tiny_models.tokens(3)
    two.train()
    for module in two.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    two.set_adapter(["default", "b"])
    two(x, labels=x, adapter_names=["b", "__base__", "default"]).logits[2].sum().backward()
    grads = {name: p.grad for name, p in two.named_parameters() if p.grad is not None}
    assert any(g.abs().sum() > 0 for n, g in grads.items() if ".default." in n)
    assert all(g.abs().sum() == 0 for n, g in grads.items() if ".b." in n)


@pytest.mark.parametrize("names", ["default", ["default"], ["default"] * 4, []])
def test_adapter_names_must_be_one_per_sample(two, names):
    with pytest.raises(RoutingError):
        two(tiny_models.tokens(3), adapter_names=names)


def test_a_failed_call_leaves_nothing_open(two):
    x = tiny_models.tokens(3)
    before = logits(two, x)
    with pytest.raises(IndexError):
        two(x + 1000, adapter_names=["b", "__base__", "default"])
    assert torch.equal(logits(two, x), before)
    with pytest.raises(ZeroDivisionError), two.disable_adapter():
        _ = 1 / 0
    assert torch.equal(logits(two, x), before)


def test_disabling_is_seen_by_status_and_not_by_other_threads(model):
    x = tiny_models.tokens()
    on = logits(model, x)
    seen = {}

    def elsewhere():
        seen["logits"] = logits(model, x)
        seen["enabled"] = model.get_model_status().enabled

    with model.disable_adapter():
        assert model.get_model_status().enabled is False
        assert not model.has_active_enabled_adapter
        off = logits(model, x)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert model.get_model_status().enabled is True
    assert model.has_active_enabled_adapter
    assert torch.equal(off, logits(tiny_models.gpt2(), x))
    assert torch.equal(seen["logits"], on)
    assert seen["enabled"] is True


def test_switching_off_for_good(model):
    x = tiny_models.tokens()
    on = logits(model, x)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, x), logits(tiny_models.gpt2(), x))
    assert torch.equal(logits(model, x, adapter_names=["default"] * 3), logits(tiny_models.gpt2(), x))
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model, x), on)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["plain", "routed", "disabled"])
def test_gradient_checkpointing_changes_no_gradient(two, reentrant, how):
    x = tiny_models.tokens(3)
    two.set_adapter(["default", "b"])

    def gradients():
        two.zero_grad()
        if how == "disabled":  # and a second, ordinary part, so that there is a gradient at all
            with two.disable_adapter():
                off = two(x, labels=x).loss
            (off + two(x, labels=x).loss).backward()
        else:
            names = ["b", "default", "__base__"] if how == "routed" else None
            two(x, labels=x, adapter_names=names).loss.backward()
        return {name: p.grad.clone() for name, p in two.named_parameters() if p.grad is not None}

    two.train()
    for module in two.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients()
    two.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients()
    assert plain
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-6)


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(two, duplicate):
    x = tiny_models.tokens()
    before = logits(two, x)
    other = duplicate(two)
    assert type(other) is type(two)
    assert torch.equal(logits(other, x), before)
    other.set_adapter("b")
    tiny_models.perturb(other, "b", seed=9)
    other.peft_config["b"] = lora(r=8)
    assert torch.equal(logits(two, x), before)
    assert two.peft_config["b"] is not other.peft_config["b"]
    assert other.state is not two.state
    other.add_adapter("c", lora())
    assert "c" not in two.peft_config
    other.unload()
    assert torch.equal(logits(two, x), before)


def test_moving_the_model_moves_its_adapters(model):
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    logits(model, tiny_models.tokens())


# -- taking out -------------------------------------------------------------------------------------------------------


def test_unload_gives_back_the_very_model():
    base = tiny_models.gpt2().train()
    for parameter in list(base.parameters())[::3]:
        parameter.requires_grad_(False)
    before = structure(base)
    wrapped = get_peft_model(base, lora(bias="all", modules_to_save=["ln_f"]))
    wrapped.add_adapter("b", LoraConfig(target_modules=["c_proj"]))
    wrapped.set_adapter(["default", "b"])
    optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        wrapped(tiny_models.tokens(), labels=tiny_models.tokens()).loss.backward()
        optimiser.step()
    assert wrapped.unload() is base
    assert_same_structure(base, before)


def test_a_wrapper_can_be_used_again_after_unloading(model):
    model.unload()
    model.add_adapter("again", lora())
    assert model.active_adapters == ["again"]
    assert list(model.peft_config) == ["again"]


def test_merge_and_unload_keeps_the_output(two):
    x = tiny_models.tokens()
    two.set_adapter(["default", "b"])
    before = logits(two, x)
    base = two.get_base_model()
    merged = two.merge_and_unload(safe_merge=True)
    assert merged is base
    assert not any("lora" in name for name in merged.state_dict())
    assert not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged, x), before, rtol=1e-4, atol=1e-5)


def test_merging_keeps_the_full_copies_of_what_was_merged():
    base = tiny_models.gpt2()
    wrapped = get_peft_model(base, lora(modules_to_save=["ln_f"]))
    wrapped.add_adapter("b", lora(modules_to_save=["ln_f"]))
    tiny_models.perturb(wrapped, "default", seed=3)
    tiny_models.perturb(wrapped, "b", seed=4)
    x = tiny_models.tokens()
    wrapped.set_adapter("b")
    expected = logits(wrapped, x)
    wrapped.set_adapter("default")
    merged = wrapped.merge_and_unload(adapter_names=["b"])
    torch.testing.assert_close(logits(merged, x), expected, rtol=1e-4, atol=1e-5)


def test_merge_and_unmerge_in_place(two):
    x = tiny_models.tokens()
    weights = {name: p.detach().clone() for name, p in two.get_base_model().named_parameters()}
    before = logits(two, x)
    two.merge_adapter()
    assert two.get_layer_status()[0].merged_adapters == ["default"]
    torch.testing.assert_close(logits(two, x), before, rtol=1e-4, atol=1e-5)
    with two.disable_adapter():
        assert torch.equal(logits(two, x), logits(tiny_models.gpt2(), x))
    with pytest.warns(inlay.InlayWarning, match="merged already"):
        two.merge_adapter()
    two.unmerge_adapter()
    with pytest.warns(inlay.InlayWarning, match="nothing to unmerge"):
        two.unmerge_adapter()
    for name, p in two.get_base_model().named_parameters():
        assert torch.equal(p, weights[name])


def test_a_merge_that_would_overflow_changes_nothing(model):
    base = model.get_base_model().half()
    with torch.no_grad():
        for layer in model.state.layers():
            layer.scaling["default"] = 1e6
    before = structure(base)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload()
    assert_same_structure(base, before)


def test_progress_of_a_merge_is_shown(model, capsys):
    model.merge_and_unload(progressbar=True)
    shown = "".join(capsys.readouterr())
    assert "2/2" in shown or "2 of 2" in shown


# -- bare models ------------------------------------------------------------------------------------------------------


def test_calls_on_a_bare_model():
    base = tiny_models.gpt2()
    x = tiny_models.tokens()
    plain = logits(base, x)
    assert inlay.inject_adapter_in_model(lora(), base) is base
    tiny_models.perturb(base, "default")
    assert base.peft_config.keys() == {"default"}
    on = logits(base, x)
    with inlay.call(base, ["default", "__base__", "default"]):
        mixed = logits(base, x)
    torch.testing.assert_close(mixed, torch.stack([on[0], plain[1], on[2]]), rtol=1e-5, atol=1e-5)
    with inlay.call(base, disabled=True):
        assert torch.equal(logits(base, x), plain)
    with pytest.raises(UnknownAdapterError):
        inlay.call(base, ["nobody"])
    with pytest.raises(StateError):
        inlay.call(tiny_models.gpt2(), ["default"])


def test_wrapping_a_model_that_has_adapters_joins_them():
    base = tiny_models.gpt2()
    inlay.inject_adapter_in_model(lora(), base)
    tiny_models.perturb(base, "default")
    x = tiny_models.tokens()
    before = logits(base, x)
    wrapped = get_peft_model(base, lora(), adapter_name="second")
    assert list(wrapped.peft_config) == ["default", "second"]
    assert torch.equal(logits(wrapped, x), before)


def test_methods_that_have_no_layers_are_refused():
    from inlay.config import PromptLearningConfig

    base = tiny_models.gpt2()
    before = structure(base)
    for enter in (inlay.inject_adapter_in_model, lambda config, model: get_peft_model(model, config)):
        with pytest.raises(UnsupportedError, match="virtual tokens"):
            enter(PromptLearningConfig(peft_type="PROMPT_TUNING"), base)
        with pytest.raises(TypeError):
            enter(None, base)
    assert_same_structure(base, before)


def test_gradient_checkpointing_by_either_name():
    """transformers 5 renamed the method and its keyword; callers of the old name pass the old one."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=1)
    model = get_peft_model(GPT2LMHeadModel(config), LoraConfig(target_modules=["c_attn"]))
    for keywords in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        model.gradient_checkpointing_enable(**keywords)
        assert model.get_base_model().is_gradient_checkpointing
        model.get_base_model().gradient_checkpointing_disable()
