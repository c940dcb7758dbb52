"""Plans of models and of descriptions, injection by plan and by state dict, and functions on bare models."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import inlay
import inlay.functional
from inlay import IA3Config, LoraConfig, VeraConfig, get_peft_model
from inlay.errors import ConfigTypeError, NoTargetError, StateError, UnknownAdapterError, UnsupportedError

X = tiny_models.tokens()


def lora(**fields):
    return LoraConfig(**({"r": 4, "target_modules": ["c_attn", "c_proj"]} | fields))


def logits(model):
    with torch.no_grad():
        return model(X).logits


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_allocates_nothing_and_predicts_everything():
    base = tiny_models.gpt2()
    plan = inlay.plan(base, lora(modules_to_save=["ln_f"]))
    assert not hasattr(base, "peft_config")
    assert "lora" not in "".join(base.state_dict())
    before, shown = plan.total, str(plan)
    wrapped = get_peft_model(base, lora(modules_to_save=["ln_f"]))
    trainable, total = wrapped.get_nb_trainable_parameters()
    assert plan.trainable == trainable
    assert "c_attn" in shown
    assert f"{trainable:,}" in shown
    assert before + trainable == total


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS", None])
def test_a_plan_from_a_description_equals_that_from_the_model(tmp_path, task):
    build = {"SEQ_CLS": "GPT2ForSequenceClassification", None: "GPT2Model"}.get(task, "GPT2LMHeadModel")
    base = tiny_models.gpt2(build)
    base.config.architectures = None
    expected = inlay.plan(base, lora(task_type=task))
    base.config.save_pretrained(tmp_path)
    for described in (base.config, base.config.to_dict(), tmp_path, str(tmp_path)):
        plan = inlay.plan(described, lora(task_type=task))
        assert plan.trainable == expected.trainable
        assert [p.site for p in plan.placements] == [p.site for p in expected.placements]
        assert type(plan.model) is type(base)
        assert all(p.is_meta for p in plan.model.parameters())
        with pytest.raises(StateError, match="plan again with the model"):
            inlay.inject(plan)


def test_without_a_task_the_architecture_that_is_named_counts():
    config = tiny_models.gpt2().config
    config.architectures = ["GPT2LMHeadModel"]
    assert type(inlay.plan(config, lora()).model).__name__ == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("described", "error"),
    [
        (3, ConfigTypeError),
        ({}, ConfigTypeError),
        (None, ConfigTypeError),
        ("/no/such/folder", UnsupportedError),
        ({"model_type": "nonsense"}, UnsupportedError),
    ],
)
def test_what_describes_no_model(described, error):
    with pytest.raises(error):
        inlay.plan(described, lora())


def test_a_plan_is_applied():
    base = tiny_models.gpt2()
    before = logits(base)
    assert inlay.inject(inlay.plan(base, lora()), seed=3) is base
    assert torch.equal(logits(base), before)
    assert base.peft_config.keys() == {"default"}
    other = tiny_models.gpt2()
    inlay.inject(inlay.plan(other, lora()), seed=3)
    assert all(torch.equal(p, dict(other.named_parameters())[n]) for n, p in base.named_parameters())
    second = inlay.plan(base, lora(r=2), "second")
    inlay.inject(second)
    assert inlay.get_model_status(base).active_adapters == ["default"]
    with pytest.raises(StateError, match="plan again"):
        inlay.inject(second)
    with pytest.raises(TypeError, match=r"inlay\.plan"):
        inlay.inject(base)


def test_a_plan_of_a_wrapped_model_enters_the_wrapper():
    wrapped = get_peft_model(tiny_models.gpt2(), VeraConfig(target_modules=["c_attn"], r=4))
    inlay.inject(inlay.plan(wrapped, VeraConfig(target_modules=["c_fc"], r=4), "second"))
    assert list(wrapped.peft_config) == ["default", "second"]
    shared = {name for name in wrapped.state_dict() if "vera_A" in name}
    assert shared == {"base_model.vera_A.default", "base_model.vera_A.second"}


# -- bare models ------------------------------------------------------------------------------------------------------


def test_injection_is_the_custom_loop():
    base = inlay.inject_adapter_in_model(lora(), tiny_models.gpt2().train())
    frozen = {n: p.detach().clone() for n, p in base.named_parameters() if "lora_" not in n}
    optimiser = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = base(X, labels=X).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.15
    assert all(torch.equal(dict(base.named_parameters())[n], value) for n, value in frozen.items())


def test_shared_tensors_of_a_bare_model_are_its_own():
    base = inlay.inject_adapter_in_model(VeraConfig(target_modules=["c_attn"], r=4), tiny_models.gpt2())
    shared = {"vera_A.default", "vera_B.default"}
    assert shared <= set(base.state_dict())
    assert base.to(torch.float64).vera_A["default"].dtype == torch.float64
    assert torch.isfinite(logits(base)).all()
    wrapped = get_peft_model(base, VeraConfig(target_modules=["c_fc"], r=4), adapter_name="second")
    names = {name for name in wrapped.state_dict() if "vera_A" in name}
    assert names == {"base_model.vera_A.default", "base_model.vera_A.second"}
    wrapped.delete_adapter("second")
    assert {name for name in wrapped.state_dict() if "vera_A" in name} == {"base_model.vera_A.default"}
    plain = wrapped.unload()
    assert plain.state_dict().keys() == tiny_models.gpt2().state_dict().keys()
    assert not hasattr(plain, "vera_A")


def test_a_second_injection_becomes_the_active_one():
    base = inlay.inject_adapter_in_model(lora(), tiny_models.gpt2())
    inlay.inject_adapter_in_model(lora(target_modules=["c_fc"]), base, "second")
    assert base.peft_config.keys() == {"default", "second"}
    assert inlay.get_model_status(base).active_adapters == ["second"]


@pytest.mark.parametrize(
    "config", [lora(bias="lora_only"), IA3Config(target_modules=["c_attn"], feedforward_modules=[])]
)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_targets_from_a_state_dict(config, prefix):
    source = inlay.inject_adapter_in_model(config, tiny_models.gpt2())
    tensors = {prefix + k: v for k, v in inlay.get_peft_model_state_dict(source).items() if ".1." in k}
    vague = type(config)(target_modules=["nothing_like_it"], **({"r": 4} if hasattr(config, "r") else {}))
    if hasattr(vague, "feedforward_modules"):
        vague.feedforward_modules = []
    base = inlay.inject_adapter_in_model(vague, tiny_models.gpt2(), state_dict=tensors)
    adapted = {layer.name for layer in inlay.get_layer_status(base)}
    assert adapted
    assert all("h.1." in name for name in adapted)
    assert base.peft_config["default"] is vague
    assert vague.target_modules == {"nothing_like_it"}
    with pytest.raises(NoTargetError):
        inlay.inject_adapter_in_model(vague, tiny_models.gpt2(), state_dict={"x.y.lora_A.weight": torch.ones(1)})


def test_low_memory_creates_nothing_until_it_is_loaded():
    source = inlay.inject_adapter_in_model(lora(), tiny_models.gpt2())
    tiny_models.perturb(source, "default")
    base = inlay.inject_adapter_in_model(lora(), tiny_models.gpt2(), low_cpu_mem_usage=True)
    assert all(p.is_meta == ("lora_" in n) for n, p in base.named_parameters())
    inlay.set_peft_model_state_dict(base, inlay.get_peft_model_state_dict(source), low_cpu_mem_usage=True)
    assert not any(p.is_meta for p in base.parameters())
    assert torch.equal(logits(base), logits(source))


@pytest.mark.parametrize("wrap", [False, True])
def test_functions_on_models(wrap):
    model = (
        get_peft_model(tiny_models.gpt2(), lora())
        if wrap
        else inlay.inject_adapter_in_model(lora(), tiny_models.gpt2())
    )
    inlay.functional.inject_adapter_in_model(lora(r=2), model, "b")
    inlay.functional.set_adapter(model, ["default", "b"])
    assert inlay.get_model_status(model).requires_grad == {"b": True, "default": True}
    inlay.functional.set_adapter(model, "b", inference_mode=True)
    assert inlay.get_model_status(model).requires_grad == {"b": False, "default": False}
    inlay.functional.set_requires_grad(model, ["default"])
    assert inlay.get_model_status(model).requires_grad == {"b": False, "default": True}
    model.to(torch.bfloat16)
    inlay.functional.cast_adapter_dtype(model, "b", autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    inlay.functional.cast_adapter_dtype(model, "b")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.dtype == torch.float32} == {"b"}
    with pytest.raises(UnsupportedError, match="lora_"):
        inlay.functional.delete_adapter(model, "b", prefix="ia3_")
    with pytest.warns(inlay.InlayWarning):
        assert inlay.functional.delete_adapter(model, "b", prefix="lora_") == ["default"]
    assert inlay.functional.delete_adapter(model, "default") is None
    with pytest.raises((UnknownAdapterError, StateError)):
        inlay.functional.set_adapter(model, "default")


# -- figures ----------------------------------------------------------------------------------------------------------


def findings(model):
    with pytest.warns(inlay.InlayWarning) as caught:
        model.print_trainable_parameters()
    assert len(caught) == 1
    return str(caught[0].message)


def test_a_healthy_model_prints_one_line_and_warns_of_nothing(recwarn, capsys):
    get_peft_model(tiny_models.gpt2(), lora()).print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 2,816 || all params: 31,360 || trainable%: 8.9796\n"
    assert not [w for w in recwarn if issubclass(w.category, inlay.InlayWarning)]


def test_what_is_wrong_with_what_trains_is_said():
    model = get_peft_model(tiny_models.gpt2(), lora())
    model.requires_grad_(True)
    assert "all parameters are trainable" in findings(model)
    model = get_peft_model(tiny_models.gpt2(), lora())
    model.transformer.wte.requires_grad_(True)
    assert "wte.weight" in findings(model)
    model.set_adapter("default", inference_mode=True)
    model.transformer.wte.requires_grad_(False)
    assert "no parameter is trainable" in findings(model)
    assert "memory is not reduced" in findings(get_peft_model(tiny_models.gpt2(), lora(r=512)))
    model.unload()
    assert "no target" in findings(model)


def test_packed_weights_are_counted_in_full():
    class Params4bit(torch.nn.Parameter):
        quant_storage = torch.uint8

    net = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False))
    wrapped = get_peft_model(net, LoraConfig(target_modules=["0"], r=1))
    net[0].base_layer.weight = Params4bit(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    assert wrapped.get_nb_trainable_parameters() == (16, 80)
