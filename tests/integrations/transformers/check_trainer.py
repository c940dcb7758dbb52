"""transformers' Trainer with adapters: checkpoints, resuming, the best model, gradient checkpointing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

IDS = tiny.tokens()
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
WHOLE_MODEL = {"model.safetensors", "pytorch_model.bin", "config.json"}


def config(**changes: Any) -> LoraConfig:
    values: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": TaskType.CAUSAL_LM}
    return LoraConfig(**(values | changes))


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "save_strategy": "steps",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(**(values | changes))


def trainer(model: Any, folder: Path, rows: Any = None, **changes: Any) -> Trainer:
    rows = tiny.language_rows() if rows is None else rows
    return Trainer(model=model, args=arguments(folder, **changes), train_dataset=rows, eval_dataset=rows)


def losses(run: Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def wrapped(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(tiny.llama(), config(**changes))


def test_checkpoints_hold_the_adapter_and_nothing_of_the_model(tmp_path: Path) -> None:
    model = wrapped()
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    run = trainer(model, tmp_path)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    for name, before in base.items():
        assert torch.equal(dict(model.named_parameters())[name], before), name
    for step in (2, 4, 6):
        files = {file.name for file in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert files >= ADAPTER_FILES | {"optimizer.pt", "trainer_state.json"}
        assert not files & WHOLE_MODEL
        assert all("lora_" in key for key in load_file(tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors"))
    run.save_model(str(tmp_path / "final"))
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "final")
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)


def test_resuming_gives_what_training_through_gives(tmp_path: Path) -> None:
    through = trainer(wrapped(), tmp_path / "through")
    through.train()
    first = trainer(wrapped(), tmp_path / "parts", max_steps=4)
    first.train()
    last = get_last_checkpoint(str(tmp_path / "parts"))
    assert last is not None
    second = trainer(wrapped(seed=1), tmp_path / "parts")
    second.train(resume_from_checkpoint=last)
    assert second.state.global_step == 6
    for mine, wanted in zip(second.model.parameters(), through.model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)
    assert [n for n, p in second.model.named_parameters() if p.requires_grad] == [
        n for n, p in through.model.named_parameters() if p.requires_grad
    ]


def test_resuming_with_several_adapters(tmp_path: Path) -> None:
    def two() -> Any:
        model = wrapped()
        model.add_adapter("other", config(r=2))
        tiny.scramble(model, ".other.")
        model.set_adapter("other")
        return model

    through = trainer(two(), tmp_path / "through")
    through.train()
    trainer(two(), tmp_path / "parts", max_steps=4).train()
    second = trainer(two(), tmp_path / "parts")
    second.train(resume_from_checkpoint=True)
    assert second.model.active_adapters == ["other"]
    for mine, wanted in zip(second.model.parameters(), through.model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)


class Worse(TrainerCallback):
    """Says that the second evaluation was the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_loss"] = {2: 2.0, 4: 1.0}.get(state.global_step, 3.0)


@pytest.mark.parametrize("full_copy", [False, True])
def test_best_model_at_the_end(full_copy: bool, tmp_path: Path) -> None:
    model = wrapped(modules_to_save=["lm_head"] if full_copy else None)
    run = trainer(model, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, learning_rate=5e-1)
    run.add_callback(Worse())
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    best = PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint-4")
    last = PeftModel.from_pretrained(tiny.llama(), tmp_path / "checkpoint-6")
    torch.testing.assert_close(model.eval()(IDS).logits, best(IDS).logits)
    assert not torch.allclose(last(IDS).logits, best(IDS).logits)
    assert [name for name, p in model.named_parameters() if p.requires_grad]


def test_model_with_add_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny.llama()
    tiny.llama().save_pretrained(tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    model.add_adapter(config(), "mine")
    run = trainer(model, tmp_path / "out")
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    files = {file.name for file in (tmp_path / "out" / "checkpoint-6").iterdir()}
    assert files >= ADAPTER_FILES
    assert not files & WHOLE_MODEL
    again = tiny.llama()
    again.load_adapter(str(tmp_path / "out" / "checkpoint-6"), "other name")
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", ["wrapper", "mixin"])
def test_gradient_checkpointing(way: str, reentrant: bool, tmp_path: Path) -> None:
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model = tiny.llama()
        if way == "wrapper":
            model = get_peft_model(model, config())
        else:
            model.add_adapter(config())
        changes: dict[str, Any] = {"gradient_checkpointing": on, "save_strategy": "no"}
        if on:
            changes["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
        run = trainer(model, tmp_path / str(on), **changes)
        run.train()
        results.append(losses(run))
        assert bool(getattr(model, "is_activation_checkpointing", model.is_gradient_checkpointing)) is on
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0][-1] < results[0][0]


def test_accumulation_clipping_and_evaluation_gives_the_same_losses_as_one_batch(tmp_path: Path) -> None:
    whole = trainer(wrapped(), tmp_path / "whole", per_device_train_batch_size=8, max_steps=3, save_strategy="no")
    whole.train()
    parts = trainer(
        wrapped(),
        tmp_path / "parts",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=3,
        save_strategy="no",
    )
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-3)
    assert whole.evaluate()["eval_loss"] == pytest.approx(parts.evaluate()["eval_loss"], rel=1e-3)
    predictions = whole.predict(tiny.language_rows(4)).predictions
    assert predictions.shape[:2] == (4, 10)


def test_label_names_and_columns_are_those_of_the_model(tmp_path: Path) -> None:
    """Columns that the bare model's forward does not take are dropped, as for the model without adapters."""
    rows = [{**row, "strange": 1} for row in tiny.language_rows()]
    for model in (wrapped(), tiny.llama()):
        run = trainer(model, tmp_path, rows=rows, save_strategy="no", max_steps=1)
        run._set_signature_columns_if_needed()
        assert "input_ids" in run._signature_columns
        assert "strange" not in run._signature_columns
        assert run.label_names == ["labels"]
        run.train()


def test_classifier(tmp_path: Path) -> None:
    model = tiny.bert("ForSequenceClassification", num_labels=2)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS))
    run = trainer(model, tmp_path, rows=tiny.class_rows(), max_steps=8, save_steps=8)
    run.train()
    assert losses(run)[-1] < losses(run)[0]
    saved = load_file(tmp_path / "checkpoint-8" / "adapter_model.safetensors")
    assert [key for key in saved if "classifier" in key]
    again = PeftModel.from_pretrained(tiny.bert("ForSequenceClassification", num_labels=2), tmp_path / "checkpoint-8")
    torch.testing.assert_close(again(IDS).logits, model.eval()(IDS).logits)


def test_model_card_says_that_it_is_an_adapter(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    run = trainer(model, tmp_path / "out", max_steps=1, save_steps=1)
    run.train()
    run.save_model()
    run.create_model_card(model_name="mine")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(IDS).logits, model.eval()(IDS).logits)


def test_noisy_embeddings_and_state_of_the_optimiser(tmp_path: Path) -> None:
    """NEFTune finds the embedding through the wrapper, and takes its hook off again."""
    model = wrapped()
    run = trainer(model, tmp_path, neftune_noise_alpha=5.0, save_strategy="no", max_steps=2)
    run.train()
    embedding = model.get_base_model().get_input_embeddings()
    assert not embedding._forward_hooks
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
