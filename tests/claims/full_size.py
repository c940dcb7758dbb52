"""GPT-2 (124 M) and BERT (110 M) from their configurations: shapes on the meta device, or random weights."""

from __future__ import annotations

from typing import Any

import torch


def gpt2(cls: str = "GPT2LMHeadModel", meta: bool = True) -> Any:
    """GPT-2 at full size."""
    import transformers

    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        return getattr(transformers, cls)(transformers.GPT2Config()).eval()


def bert(cls: str = "BertModel", meta: bool = True) -> Any:
    """BERT base at full size."""
    import transformers

    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        return getattr(transformers, cls)(transformers.BertConfig()).eval()


def numel(module: torch.nn.Module) -> int:
    """Parameters of a module, each counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
