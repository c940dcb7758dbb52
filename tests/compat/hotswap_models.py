"""One small model with every kind of layer that LoRA adapts, and adapters for it that the real peft wrote."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import inlay
from inlay.core.policy import INLAY, Policy
from inlay.models.entry import inject_bare, wrap

TARGETS = ["emb", "conv", "grouped", "conv1d_hf", "lin"]


class Model(nn.Module):
    """Token ids (batch, length) to features (batch, length, 6)."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(1, 2, (3, 1), padding=(1, 0))
        self.grouped = nn.Conv2d(2, 2, 1, groups=2)
        self.conv1d_hf = Conv1D(8, 16)
        self.lin = nn.Linear(8, 8)
        self.head = nn.Linear(8, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.grouped(torch.relu(self.conv(self.emb(ids).unsqueeze(1))))
        return self.head(torch.relu(self.lin(self.conv1d_hf(h.permute(0, 2, 1, 3).flatten(2)))))


def base() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def ids() -> Tensor:
    return torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(1))


def config(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": list(TARGETS)} | fields)


class Written:
    """An adapter of random values that peft wrote into ``folder``, and the output of peft with it."""

    def __init__(self, folder: Path, seed: int = 3, **fields: Any) -> None:
        self.folder = str(folder)
        self.config = config(**fields)
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: Any = peft.get_peft_model(base(), copy.deepcopy(self.config)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter) * 0.3)
            model.save_pretrained(self.folder)
        self.tensors = peft.get_peft_model_state_dict(model)
        self.output = model(ids()).detach()

    @property
    def ours(self) -> Any:
        found = inlay.PeftConfig.from_pretrained(self.folder)
        found.inference_mode = False
        return found

    def inserted(self, name: str = "default", prefix: str = "base_model.model.") -> dict[str, Tensor]:
        """The tensors by the names that they have in a model, as low-level callers pass them."""
        found = {}
        for key, value in self.tensors.items():
            key = prefix + key.removeprefix("base_model.model.")
            before, lora, after = key.partition(".lora_")
            part, _, leaf = after.partition(".")
            found[f"{before}{lora}{part}.{name}" + (f".{leaf}" if leaf else "")] = value
        return found


def loaded(written: Written, policy: Policy = INLAY, name: str = "default") -> Any:
    """Inlay's model with the adapter."""
    made = wrap(base(), written.ours, name, policy=policy).eval()
    inlay.set_peft_model_state_dict(made, written.tensors, adapter_name=name)
    return made


def injected(written: Written, name: str = "default", policy: Policy = INLAY) -> Model:
    """A bare model with the adapter, as diffusers and transformers make it."""
    made: Any = inject_bare(written.ours, base(), name, False, None, policy=policy)
    inlay.set_peft_model_state_dict(made, written.tensors, adapter_name=name)
    return made


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def frozen(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def pefts(written: Written):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base(), written.folder)
