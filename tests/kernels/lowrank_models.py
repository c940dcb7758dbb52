"""Small models with low-rank adapters for tests of the fused path, and ways to run them on it and off it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.active import set_active
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import INLAY, Policy
from inlay.core.state import State, find_state
from inlay.kernels.switch import without_fast_paths
from inlay.methods.lora import LoraConfig
from inlay.methods.vera import VeraConfig

WIDTH, OUT = 12, 10

# variant -> the configs of its adapters, all of them active
VARIANTS: dict[str, Callable[[], list[Any]]] = {
    "lora": lambda: [LoraConfig(r=3, lora_alpha=5)],
    "rslora": lambda: [LoraConfig(r=5, lora_alpha=4, use_rslora=True)],
    "lora_bias": lambda: [LoraConfig(r=3, lora_alpha=5, lora_bias=True)],
    "vera": lambda: [VeraConfig(r=7)],
    "dora": lambda: [LoraConfig(r=3, lora_alpha=5, use_dora=True)],
    "two": lambda: [LoraConfig(r=3, lora_alpha=5), LoraConfig(r=1, lora_alpha=2)],
}


class One(nn.Module):
    """One adapted layer, named ``layer``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Three(nn.Module):
    """Three layers that read one tensor, and one behind them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, OUT)
        self.o = nn.Linear(OUT, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0  # as behind a norm: one tensor for the three
        y = self.q(x).tanh() * self.k(x)
        return self.o(self.v(x)) + y


def linear(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return One(nn.Linear(WIDTH, OUT, bias))


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = One(Conv1D(OUT, WIDTH))
    nn.init.normal_(model.layer.bias)
    return model


def three() -> nn.Module:
    torch.manual_seed(0)
    return Three()


def adapted(
    model: nn.Module,
    variant: str = "lora",
    policy: Policy = INLAY,
    dtype: torch.dtype = torch.float64,
    targets: tuple[str, ...] = ("layer",),
    autocast: bool = True,
    **options: Any,
) -> tuple[nn.Module, State]:
    """Inject the adapters of a variant, activate all and give every tensor a value that matters."""
    model = model.to(dtype)
    names = []
    for i, config in enumerate(VARIANTS[variant]()):
        config.target_modules = set(targets)
        for option, value in options.items():
            setattr(config, option, value)
        names.append(f"number{i}")
        inject(plan(model, config, names[-1], policy=policy, autocast_adapter_dtype=autocast), seed=1)
    state = find_state(model)
    assert state is not None
    set_active(state, names, trainable=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name and parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
                parameter.add_(0.3 * noise.to(parameter.dtype))
    return model, state


def batch(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def run(model: nn.Module, x: Tensor, wants: bool = True) -> dict[str, Tensor]:
    """Return the output and, by name, the gradients of its weighted sum; ``x``'s with ``wants``."""
    for parameter in model.parameters():
        parameter.grad = None
    if wants:
        x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).cos().view(y.shape)
    if y.requires_grad:
        (y.double() * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if wants:
        assert x.grad is not None
        found["x"] = x.grad
    return {**found, "y": y.detach()}


def run_generic(model: nn.Module, x: Tensor, wants: bool = True) -> dict[str, Tensor]:
    with without_fast_paths():
        return run(model, x, wants)


def off_by(found: Tensor, expected: Tensor) -> float:
    """Largest error as a share of the largest magnitude."""
    assert found.shape == expected.shape
    if not found.numel():
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    assert bool(found.isfinite().all())
    return float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert off_by(found[name], tensor) <= tolerance, (name, off_by(found[name], tensor))
