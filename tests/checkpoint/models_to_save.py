"""Small models with adapters to save, one config for every method, and adapters whose every tensor differs."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cells import METHODS, family
from torch import Tensor, nn

from inlay.checkpoint import adapter_slots
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import INLAY, Policy
from inlay.core.registry import config_class
from inlay.core.state import State, find_state


class Net(nn.Module):
    """One layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.lin = nn.Linear(8, 8)
        self.wide = nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(torch.tanh(self.lin(self.emb(x))))
        x = self.conv(self.norm(x).transpose(1, 2)).mean(-1)
        return self.head(x)


def net(seed: int = 0) -> Net:
    """The same base model for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net().eval()


def tokens() -> Tensor:
    return torch.randint(0, 10, (3, 5), generator=torch.Generator().manual_seed(1))


def _config(peft_type: str, **fields: Any) -> Callable[[], Any]:
    return lambda: config_class(peft_type)(**fields)


# peft_type -> configs; every available method has an entry
CONFIGS: dict[str, dict[str, Callable[[], Any]]] = {
    "LORA": {
        "linear": _config("LORA", r=2, target_modules=["lin", "wide"]),
        "kinds": _config("LORA", r=2, target_modules=["lin", "emb", "conv"], rank_pattern={"lin": 3}),
        "dora": _config("LORA", r=2, target_modules=["lin", "emb", "conv"], use_dora=True),
        "copy": _config("LORA", r=2, target_modules=["lin"], modules_to_save=["head"]),
        "bias": _config("LORA", r=2, target_modules=["lin"], bias="all"),
        "own_bias": _config("LORA", r=2, target_modules=["lin", "conv"], bias="lora_only"),
        "lora_bias": _config("LORA", r=2, target_modules=["lin"], lora_bias=True),
        "bias_and_copy": _config("LORA", r=2, target_modules=["lin"], bias="all", modules_to_save=["head"]),
    },
    "IA3": {"kinds": _config("IA3", target_modules=["lin", "wide", "conv"], feedforward_modules=["wide"])},
    "LOHA": {"kinds": _config("LOHA", r=2, target_modules=["lin", "conv"], use_effective_conv2d=True)},
    "OFT": {"kinds": _config("OFT", oft_block_size=4, target_modules=["lin", "wide"])},
    "VERA": {
        "saved": _config("VERA", r=3, target_modules=["lin", "wide"]),
        "regenerated": _config("VERA", r=3, target_modules=["lin", "wide"], save_projection=False),
    },
    "FOURIERFT": {"linear": _config("FOURIERFT", n_frequency=7, target_modules=["lin", "wide"])},
    "LN_TUNING": {"norm": _config("LN_TUNING", target_modules=["norm"])},
    "TRAINABLE_TOKENS": {"rows": _config("TRAINABLE_TOKENS", token_indices=[1, 4], target_modules=["emb"])},
}
for name in METHODS:  # the others as the cells have them, on two linear layers
    if family(name) not in (*CONFIGS, "DORA"):
        CONFIGS[family(name)] = {"linear": partial(METHODS[name], {"target_modules": ["lin", "wide"]})}
CASES = [(method, case) for method, cases in CONFIGS.items() for case in cases]


def adapted(
    config: Any, name: str = "default", model: nn.Module | None = None, policy: Policy = INLAY, **options: Any
) -> tuple[nn.Module, State]:
    """Return a model with an adapter, with initial values that depend on the name."""
    model = net() if model is None else model
    seed = zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model, inject(plan(model, config, name, policy=policy), seed=seed, **options)


def shaken(model: nn.Module, name: str = "default", seed: int = 3) -> nn.Module:
    """Move every saved tensor of an adapter to values of its own."""
    state = find_state(model)
    assert state is not None
    for key, target in adapter_slots(model, name).items():
        noise = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name} {key}".encode()))
        with torch.no_grad():
            if "frod_V" in key:  # follows from the base weights, and another constant follows from it
                continue
            if target.tensor.is_floating_point():
                target.tensor.add_(torch.rand(target.tensor.shape, generator=noise) * 0.2 + 0.1)
            elif "num_batches_tracked" in key:  # other whole numbers are places in a weight
                target.tensor.add_(7)
    return model


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless names, dtypes and bits are equal."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert found[name].contiguous().numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name
