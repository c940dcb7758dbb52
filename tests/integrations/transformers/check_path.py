"""The other way in: the folder of ``inlay shim-path`` on PYTHONPATH, which child processes inherit.

What transformers asks about peft before it uses it, and that a run of the Trainer and its data workers see Inlay.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.trainer_utils import _is_peft_model, unwrap_peft_model
from transformers.utils import check_peft_version, is_peft_available

import inlay

WAY_IN = "PYTHONPATH"


def test_found_by_every_question() -> None:
    assert is_peft_available()
    assert importlib.metadata.version("peft") == peft.__version__
    check_peft_version(min_version=MIN_PEFT_VERSION)
    from accelerate.utils import is_peft_model
    from accelerate.utils.imports import is_peft_available as accelerate_finds

    assert accelerate_finds()
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    assert is_peft_model(model)
    assert _is_peft_model(model)
    assert unwrap_peft_model(model) is model.get_base_model()
    assert PeftModel is inlay.PeftModel


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples that are made in a worker, which says whether peft is Inlay there."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        import peft

        assert peft.PeftModel.__module__.startswith("inlay")
        return tiny.language_rows()[index]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_workers(context: str, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        dataloader_num_workers=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=1,
    )
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    run = Trainer(model=model, args=arguments, train_dataset=Rows())
    loader = run.get_train_dataloader
    run.get_train_dataloader = lambda: _started(loader(), context)  # type: ignore[method-assign]
    run.train()
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").exists()


def _started(loader: Any, context: str) -> Any:
    (getattr(loader, "base_dataloader", None) or loader).multiprocessing_context = context
    return loader


def test_child_process_and_pickles(tmp_path: Path) -> None:
    model = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    tiny.scramble(model)
    torch.save(model, tmp_path / "model.pt")
    script = (
        "import sys, torch, tiny; model = torch.load(sys.argv[1], weights_only=False)\n"
        "import peft, inlay; assert isinstance(model, peft.PeftModel) and peft.PeftModel is inlay.PeftModel\n"
        "torch.save(model(tiny.tokens()).logits, sys.argv[1] + '.out')\n"
    )
    environment = {**dict(__import__("os").environ)}
    environment["PYTHONPATH"] += f":{Path(tiny.__file__).parent}"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model.pt")], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    torch.testing.assert_close(torch.load(tmp_path / "model.pt.out"), model(tiny.tokens()).logits)
