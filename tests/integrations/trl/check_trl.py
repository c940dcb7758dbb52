"""TRL's trainers with ``peft_config``: what trains, what is saved, what comes back, and what a merge gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

PAIRS = list(zip(tiny.SENTENCES, reversed(tiny.SENTENCES), strict=True))
COMMON = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "report_to": "none",
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | changes))


def base_values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the base's parameters by the names that they have without adapters."""
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): value.detach().clone()
        for name, value in model.named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    }


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def check_trained(trainer: Any, before: dict[str, torch.Tensor]) -> None:
    """The adapter moved, the base did not."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(model, PeftModel)
    after = base_values(model)
    assert all(torch.equal(after[name], value) for name, value in before.items() if name in after)
    moved = [value for name, value in model.named_parameters() if "lora_B" in name]
    assert moved
    assert all(value.abs().sum() > 0 for value in moved)
    assert all(
        value.requires_grad == ("lora_" in name) for name, value in model.named_parameters() if "score" not in name
    )


def check_saved(trainer: Any, folder: Path, fresh: Any, inputs: dict[str, torch.Tensor]) -> None:
    """The folder holds the adapter alone; on a fresh base, and merged, it gives the same outputs."""
    trainer.save_model(str(folder))
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        loaded = PeftModel.from_pretrained(fresh, folder)
        torch.testing.assert_close(loaded(**inputs).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}])
def test_sft(tmp_path: Path, options: dict[str, Any]) -> None:
    base = tiny.llama()
    before = base_values(base)
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(tmp_path), max_length=16, **(COMMON | {"gradient_checkpointing": False} | options)
        ),
        train_dataset=Dataset.from_dict({"text": tiny.SENTENCES}),
        processing_class=tiny.tokenizer(),
        peft_config=lora(),
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    check_trained(trainer, before)
    check_saved(trainer, tmp_path / "adapter", tiny.llama(), {"input_ids": tiny.tokens()})


def test_sft_of_a_model_that_has_adapters(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), lora(task_type="CAUSAL_LM"))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path), max_length=16, **(COMMON | {"save_strategy": "steps", "save_steps": 2})
        ),
        train_dataset=Dataset.from_dict({"text": tiny.SENTENCES}),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    files = {path.name for path in (tmp_path / "checkpoint-2").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    check_saved(trainer, tmp_path / "adapter", tiny.llama(), {"input_ids": tiny.tokens()})


def test_sft_with_a_head_of_its_own(tmp_path: Path) -> None:
    """``modules_to_save`` trains beside the adapter and is in its folder."""
    trainer = SFTTrainer(
        model=tiny.llama(),
        args=SFTConfig(output_dir=str(tmp_path), max_length=16, **COMMON),
        train_dataset=Dataset.from_dict({"text": tiny.SENTENCES}),
        processing_class=tiny.tokenizer(),
        peft_config=lora(modules_to_save=["lm_head"]),
    )
    trainer.train()
    head = trainer.accelerator.unwrap_model(trainer.model).get_base_model().lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    check_saved(trainer, tmp_path / "adapter", tiny.llama(), {"input_ids": tiny.tokens()})


def preferences() -> Dataset:
    prompts = [first for first, _ in PAIRS]
    return Dataset.from_dict(
        {
            "prompt": prompts,
            "chosen": [f" {first}" for first, _ in PAIRS],
            "rejected": [f" {last}" for _, last in PAIRS],
        }
    )


def test_dpo_compares_with_the_base(tmp_path: Path) -> None:
    """A fresh adapter is its own reference: the loss starts at ln 2, and the reference is the base throughout."""
    base = tiny.llama()
    before = base_values(base)
    trainer = DPOTrainer(
        model=base,
        args=DPOConfig(output_dir=str(tmp_path), max_length=32, **(COMMON | {"max_steps": 6})),
        train_dataset=preferences().select([0] * 12),
        processing_class=tiny.tokenizer(),
        peft_config=lora(),
    )
    trainer.train()
    values = losses(trainer)
    assert values[0] == pytest.approx(math.log(2), abs=1e-4)
    assert values[-1] < values[0] - 0.01  # one pair over and over is learned
    check_trained(trainer, before)
    check_saved(trainer, tmp_path / "adapter", tiny.llama(), {"input_ids": tiny.tokens()})


def test_dpo_of_a_model_that_has_adapters(tmp_path: Path) -> None:
    """An adapter that is trained already is the policy, and its copy as it was is the reference."""
    model = get_peft_model(tiny.llama(), lora(task_type="CAUSAL_LM"))
    tiny.scramble(model)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(tmp_path), max_length=32, **COMMON),
        train_dataset=preferences(),
        processing_class=tiny.tokenizer(),
    )
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)


def length_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(str(completion).split())) for completion in completions]


def test_grpo(tmp_path: Path) -> None:
    base = tiny.llama()
    before = base_values(base)
    trainer = GRPOTrainer(
        model=base,
        reward_funcs=length_reward,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            num_generations=2,
            max_completion_length=6,
            beta=0.1,
            **(COMMON | {"max_steps": 2}),
        ),
        train_dataset=Dataset.from_dict({"prompt": tiny.SENTENCES}),
        processing_class=tiny.tokenizer(chat=False),
        peft_config=lora(),
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    model = trainer.accelerator.unwrap_model(trainer.model)
    after = base_values(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    check_saved(trainer, tmp_path / "adapter", tiny.llama(), {"input_ids": tiny.tokens()})


def test_reward(tmp_path: Path) -> None:
    base = tiny.llama("ForSequenceClassification", num_labels=1)
    before = base_values(base)
    trainer = RewardTrainer(
        model=base,
        args=RewardConfig(output_dir=str(tmp_path), max_length=32, **COMMON),
        train_dataset=preferences().remove_columns("prompt"),
        processing_class=tiny.tokenizer(),
        peft_config=lora(task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer))
    before.pop("score.weight", None)
    check_trained(trainer, before)
    fresh = tiny.llama("ForSequenceClassification", num_labels=1)
    check_saved(trainer, tmp_path / "adapter", fresh, {"input_ids": tiny.tokens()})
