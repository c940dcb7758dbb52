"""Six tasks: labels and loss, and generation with an adapter for each prompt."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import inlay
from inlay import LoraConfig, TaskType, get_peft_model
from inlay.errors import RoutingError, UnknownAdapterError, UnsupportedError

X = tiny_models.tokens()
MASK = torch.ones_like(X)
TASKS = {
    "CAUSAL_LM": (lambda: tiny_models.gpt2(), {"labels": X}),
    "SEQ_2_SEQ_LM": (lambda: tiny_models.t5(), {"labels": X}),
    "SEQ_CLS": (lambda: tiny_models.bert("BertForSequenceClassification"), {"labels": torch.tensor([0, 1, 0])}),
    "TOKEN_CLS": (lambda: tiny_models.bert("BertForTokenClassification"), {"labels": X % 2}),
    "QUESTION_ANS": (
        lambda: tiny_models.bert("BertForQuestionAnswering"),
        {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 4])},
    ),
    "FEATURE_EXTRACTION": (lambda: tiny_models.bert(), {}),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_wrapper_of_a_task_gives_the_models_own_loss(task):
    build, labels = TASKS[task]
    base = build()
    inputs = {"input_ids": X, "attention_mask": MASK, **labels}
    base.requires_grad_(False)  # torch may choose another attention kernel where nothing needs a gradient
    expected = base(**inputs)
    wrapped = get_peft_model(base, LoraConfig(task_type=task))
    assert type(wrapped) is inlay.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType(task)]
    found = wrapped(**inputs)
    assert found.keys() == expected.keys()
    for key in ("loss", "logits", "start_logits", "last_hidden_state"):
        if key in expected:
            assert torch.equal(found[key], expected[key])
    if labels:
        found.loss.backward()
        trained = {name for name, p in wrapped.named_parameters() if p.grad is not None}
        assert trained == {name for name, p in wrapped.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_the_new_head_trains_too(task):
    wrapped = get_peft_model(TASKS[task][0](), LoraConfig(task_type=task))
    head = "qa_outputs" if task == "QUESTION_ANS" else "classifier"
    assert head in wrapped.modules_to_save
    assert head in wrapped.peft_config["default"].modules_to_save
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trained == [f"base_model.model.{head}.modules_to_save.default.{leaf}" for leaf in ("weight", "bias")]


def test_task_ids_are_not_swallowed():
    wrapped = get_peft_model(tiny_models.gpt2(), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedError, match="task_ids"):
        wrapped(X, task_ids=torch.zeros(3))


# -- generation -------------------------------------------------------------------------------------------------------


def adapted(base):
    targets = ["q", "v", "wi", "wo"] if base.config.is_encoder_decoder else ["c_attn", "c_proj", "c_fc"]
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    wrapped = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type=task))
    wrapped.add_adapter("b", LoraConfig(r=4, target_modules=targets, task_type=task))
    for seed, name in enumerate(("default", "b")):
        tiny_models.perturb(wrapped, name, scale=1.0, seed=seed)
    return wrapped


@pytest.mark.parametrize("build", [tiny_models.gpt2, tiny_models.t5], ids=["decoder", "encoder-decoder"])
@pytest.mark.parametrize("ways", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_generation_with_an_adapter_for_each_prompt(build, ways):
    wrapped = adapted(build())
    names = ["b", "__base__", "default"]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **ways}
    mixed = wrapped.generate(input_ids=X, attention_mask=MASK, adapter_names=names, **options)
    rows = options.get("num_return_sequences", 1)
    outputs = []
    for row, name in enumerate(names):
        one = {"input_ids": X[row : row + 1], "attention_mask": MASK[row : row + 1]}
        if name == "__base__":
            with wrapped.disable_adapter():
                alone = wrapped.generate(**one, **options)
        else:
            wrapped.set_adapter(name)
            alone = wrapped.generate(**one, **options)
        outputs.append(alone)
        assert torch.equal(mixed[row * rows : (row + 1) * rows], alone)
    assert not torch.equal(outputs[0][:, -6:], outputs[1][:, -6:])  # adapters that change nothing would prove nothing


def test_sampled_return_sequences_use_the_prompts_adapter():
    wrapped = adapted(tiny_models.gpt2())
    out = wrapped.generate(
        input_ids=X, adapter_names=["b", "b", "default"], do_sample=True, num_return_sequences=4, max_new_tokens=2
    )
    assert out.shape[0] == 12


def test_generation_refuses_what_it_cannot_honour():
    wrapped = adapted(tiny_models.gpt2())
    with pytest.raises(RoutingError):
        wrapped.generate(input_ids=X, adapter_names=["b"])
    with pytest.raises(UnknownAdapterError):
        wrapped.generate(input_ids=X, adapter_names=["b", "c", "b"])
    wrapped.merge_adapter()
    with pytest.raises(RoutingError, match="merged"):
        wrapped.generate(input_ids=X, adapter_names=["b", "default", "b"])


def test_prepare_inputs_for_generation_is_the_models():
    wrapped = adapted(tiny_models.gpt2())
    ours = wrapped.prepare_inputs_for_generation(X, attention_mask=MASK, use_cache=False)
    theirs = wrapped.get_base_model().prepare_inputs_for_generation(X, attention_mask=MASK, use_cache=False)
    assert ours.keys() == theirs.keys()
