"""One process of a DDP run on Inlay; started by torchrun, writes what it found to a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader

folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
torch.manual_seed(0)
model = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
rows = DataLoader(tiny.tokens(8, 10), batch_size=8 // accelerator.num_processes // 2)
model, optimiser, rows = accelerator.prepare(model, optimiser, rows)
model.train()


def epoch() -> None:
    for ids in rows:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            optimiser.step()
            optimiser.zero_grad()


epoch()
accelerator.save_state(str(folder / "state"))
epoch()
inner = accelerator.unwrap_model(model)
assert isinstance(inner, PeftModel)
after = {name: value.detach().clone() for name, value in inner.named_parameters() if "lora_" in name}
accelerator.load_state(str(folder / "state"))
epoch()
for name, value in inner.named_parameters():
    if name in after:
        torch.testing.assert_close(value, after[name])  # the second epoch again, from the saved state
gathered = accelerator.get_state_dict(model)
inner.save_pretrained(folder / "adapter", state_dict=gathered, is_main_process=accelerator.is_main_process)
if accelerator.is_main_process:
    torch.save({"adapter": after, "processes": accelerator.num_processes}, folder / "result.pt")
accelerator.wait_for_everyone()
accelerator.end_training()
