"""What PEFT computes with a saved adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from serving_adapters import llama

TOKENS = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(2))


def loaded(folder: Path, model: Any = None) -> Any:
    """The adapter as PEFT loads it onto the plain base; a missing or unknown tensor is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(llama() if model is None else model, str(folder)).eval()


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT adds to each weight, from its own scales, in double precision."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            scale = module.scaling["default"]
            if "default" in module.lora_A:
                a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            else:
                a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
            found[name] = scale * b.detach().double() @ a.detach().double()
    return found


def assert_equal_to(found: torch.Tensor, right: torch.Tensor, within: float = 1e-6) -> None:
    """Equal but for rounding: the largest difference against the largest value."""
    assert float((found - right).abs().max()) <= within * float(right.abs().max())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits
