"""The model and the methods that law L7 runs over: sharded equals unsharded."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.plan import plan
from inlay.core.state import State
from inlay.methods.c3a import C3AConfig
from inlay.methods.delora import DeloraConfig
from inlay.methods.fourierft import FourierFTConfig
from inlay.methods.gralora import GraloraConfig
from inlay.methods.ia3 import IA3Config
from inlay.methods.loha import LoHaConfig
from inlay.methods.lokr import LoKrConfig
from inlay.methods.lora import LoraConfig
from inlay.methods.miss import MissConfig
from inlay.methods.oft import OFTConfig
from inlay.methods.shira import ShiraConfig
from inlay.methods.vera import VeraConfig
from inlay.methods.waveft import WaveFTConfig

SEED = 7
WIDTH, HIDDEN, CLASSES, BATCH = 16, 24, 5, 6
# A layer that tensor parallelism splits by output, one that it splits by input, and one that it leaves alone.
TARGETS: dict[str, Any] = {"target_modules": ["up", "down", "head"]}

METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=6, **TARGETS),
    "lora_bias": lambda: LoraConfig(r=3, lora_bias=True, bias="lora_only", **TARGETS),
    "dora": lambda: LoraConfig(r=4, lora_alpha=6, use_dora=True, **TARGETS),
    "ia3": lambda: IA3Config(feedforward_modules=["down"], **TARGETS),
    "loha": lambda: LoHaConfig(r=2, alpha=3, **TARGETS),
    "lokr": lambda: LoKrConfig(r=2, alpha=3, **TARGETS),
    "c3a": lambda: C3AConfig(block_size=4, init_weights=True, target_modules=["up", "down"]),
    "gralora": lambda: GraloraConfig(r=4, alpha=6, target_modules=["up", "down"]),
    "miss": lambda: MissConfig(r=5, **TARGETS),
    "shira": lambda: ShiraConfig(r=2, **TARGETS),
    "waveft": lambda: WaveFTConfig(n_frequency=20, scaling=3.0, wavelet_family="db2", **TARGETS),
    "delora": lambda: DeloraConfig(r=2, delora_lambda=3, **TARGETS),
    "oft": lambda: OFTConfig(r=0, oft_block_size=4, **TARGETS),
    "oft_cayley": lambda: OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, **TARGETS),
    "vera": lambda: VeraConfig(r=4, init_weights=False, **TARGETS),
    "fourierft": lambda: FourierFTConfig(n_frequency=20, scaling=3.0, **TARGETS),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    """Two residual blocks and a head with an odd number of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net()


def batch() -> Tensor:
    return torch.randn(BATCH, 3, WIDTH, generator=torch.Generator().manual_seed(1))


def loss(y: Tensor) -> Tensor:
    """A mean with unlike weights per element, so that swapped features show; samples weigh the same."""
    weights = torch.linspace(-1.0, 2.0, y[0].numel()).cos().view(y.shape[1:])
    return (y * weights + 0.1 * y.square()).mean()


def adapted(model: nn.Module, config: str | Any, name: str = "one") -> State:
    """Inject an adapter of a configuration, or of one of :data:`METHODS`."""
    return inject(plan(model, METHODS[config]() if isinstance(config, str) else config, name), seed=SEED)


def perturb(state: State, name: str = "one") -> None:
    """Give every trainable tensor of an unsharded adapter noise, so that every part of it has an effect."""
    for layer in state.layers():
        for entry in layer.entries.get(name, ()) if isinstance(layer, AdaptedLayer) else ():
            values = layer.params(entry)
            for role, slot in entry.method.slots(entry.site).items():
                if slot.trainable:
                    seed = zlib.crc32(f"{layer.site.name} {slot.key}".encode())
                    noise = torch.randn(slot.shape, generator=torch.Generator().manual_seed(seed))
                    with torch.no_grad():
                        getattr(values, role).add_(0.3 * noise)
