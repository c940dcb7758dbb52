"""accelerate: DDP over two processes through torchrun, accumulation, saved state; against the same in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import PeftModel

HERE = Path(__file__).parent
WAY_IN = "PYTHONPATH"  # which torchrun's children inherit


def launched(folder: Path, processes: int) -> dict[str, Any]:
    folder.mkdir()
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(HERE.parent)])
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*start, str(HERE / "job.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "result.pt")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one, two = launched(tmp_path / "one", 1), launched(tmp_path / "two", 2)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, value in one["adapter"].items():
        torch.testing.assert_close(two["adapter"][name], value, rtol=1e-4, atol=1e-6)
    assert any(value.abs().sum() > 0 for name, value in one["adapter"].items() if "lora_B" in name)
    ids = tiny.tokens()
    outputs = []
    for run in ("one", "two"):
        files = {path.name for path in (tmp_path / run / "adapter").iterdir()}
        assert "adapter_model.safetensors" in files
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / run / "adapter")
        with torch.no_grad():
            outputs.append(loaded(input_ids=ids).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(outputs[0], tiny.llama()(input_ids=ids).logits, atol=1e-4)
