"""transformers' Trainer drives a wrapped model like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch

import inlay
from inlay import LoraConfig, get_peft_model

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(torch.utils.data.Dataset):
    """Sequences that count upwards, which is easy to learn."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = (torch.arange(8) + 3 * index) % 50 + 3
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def wrapped(build=tiny_models.gpt2, **fields):
    torch.manual_seed(0)
    return get_peft_model(
        build(), LoraConfig(**({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields))
    )


def trainer(model, folder, **changes):
    from transformers import Trainer, TrainingArguments

    values = {"output_dir": str(folder), "max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 3e-2}
    values |= {"report_to": "none", "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "seed": 1}
    values |= {"save_strategy": "no"}
    return Trainer(model=model, args=TrainingArguments(**(values | changes)), train_dataset=Rows(), eval_dataset=Rows())


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_training_lowers_the_loss_and_touches_only_the_adapter(tmp_path, checkpointing):
    model = wrapped()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    changes = {}
    if checkpointing is not None:
        changes = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing}}
    run = trainer(model, tmp_path, **changes)
    assert run.label_names == ["labels"]
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.1
    assert all(torch.equal(dict(model.named_parameters())[n], value) for n, value in base.items())


def test_the_tuned_model_generates_and_is_saved_small(tmp_path):
    model = wrapped()
    trainer(model, tmp_path / "run").train()
    model.save_pretrained(tmp_path / "adapter")
    fresh = inlay.PeftModel.from_pretrained(tiny_models.gpt2(), tmp_path / "adapter")
    prompt = Rows()[0]["input_ids"][None, :4]
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    model.eval()
    assert torch.equal(fresh.generate(prompt, **options), model.generate(prompt, **options))
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert weights < 0.5 * sum(p.numel() * 4 for p in model.get_base_model().parameters())


def test_training_resumes_from_a_checkpoint(tmp_path):
    """Trainer knows PEFT's classes only and saves the whole state dict; what it loads must be what it saved."""
    build = lambda: tiny_models.gpt2(tie_word_embeddings=False)  # noqa: E731 - safetensors refuses tied names
    whole = trainer(wrapped(build), tmp_path / "whole")
    whole.train()
    first = trainer(wrapped(build), tmp_path / "part", save_strategy="steps", save_steps=4)
    first.train()
    (checkpoint,) = [p for p in Path(tmp_path / "part").iterdir() if p.name == "checkpoint-4"]
    resumed = trainer(wrapped(build), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    torch.testing.assert_close(losses(resumed)[-4:], losses(whole)[-4:], rtol=1e-5, atol=1e-6)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = wrapped(lambda: tiny_models.gpt2(tie_word_embeddings=False))
    run = trainer(
        model,
        tmp_path,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=4,
        eval_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first is the best, and loading it changes something
    )
    run.train()
    best = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert best[4] > best[8]
    assert run.evaluate()["eval_loss"] == pytest.approx(best[4], rel=1e-5)


def test_a_model_whose_forward_takes_no_more_is_not_given_more(tmp_path):
    """Trainer passes the number of items to models that take keywords; the wrapper does, the model may not."""

    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(64, 64)
            self.lin = torch.nn.Linear(64, 64)

        def forward(self, input_ids, attention_mask=None, labels=None):
            scores = self.lin(self.embed(input_ids))
            return {"loss": torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}

    model = get_peft_model(Small(), LoraConfig(target_modules=["lin"], task_type="CAUSAL_LM"))
    assert model.accepts_loss_kwargs is False
    assert wrapped().accepts_loss_kwargs is True
    run = trainer(model, tmp_path)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


def test_columns_that_encoders_need_reach_them(tmp_path):
    """The wrapper's signature names them, so Trainer does not drop them in silence."""
    from transformers import Trainer, TrainingArguments

    model = get_peft_model(tiny_models.bert("BertForSequenceClassification"), LoraConfig(task_type="SEQ_CLS"))
    run = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    run._set_signature_columns_if_needed()
    assert {"input_ids", "attention_mask", "token_type_ids", "position_ids", "labels"} <= set(run._signature_columns)
    assert run.label_names == ["labels"]
    answers = get_peft_model(tiny_models.bert("BertForQuestionAnswering"), LoraConfig(task_type="QUESTION_ANS"))
    run = Trainer(model=answers, args=TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    assert run.label_names == ["start_positions", "end_positions"]
