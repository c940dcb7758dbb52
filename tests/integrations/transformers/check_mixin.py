"""The adapter methods that transformers gives its models (``PeftAdapterMixin``)."""

from __future__ import annotations

import tiny
import torch
from peft import LoraConfig


def test_add_adapter_changes_nothing_at_first() -> None:
    model = tiny.llama()
    ids = tiny.tokens()
    before = model(ids).logits
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    assert torch.equal(model(ids).logits, before)
    tiny.scramble(model)
    assert not torch.allclose(model(ids).logits, before)
