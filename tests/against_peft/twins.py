"""The same small model with the same adapter, once by PEFT and once by Inlay."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import inlay.core.registry as registry
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.core.policy import INLAY, Policy
from inlay.core.state import State

PREFIX = "base_model.model."


class One(nn.Module):
    """One layer to adapt, named ``layer``, and one to leave alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.beside = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def hf_conv1d(out: int, channels: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out, channels)
    nn.init.normal_(layer.bias)
    return layer


def shaken(layer: nn.Module) -> nn.Module:
    """Give a layer's vectors (norm weights, biases) values that show when they are mistaken."""
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer


@dataclass(frozen=True)
class Layer:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int = 0

    def model(self, seed: int = 0) -> One:
        torch.manual_seed(seed)
        return One(shaken(self.build())).eval()

    def input(self, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.vocabulary:
            return torch.randint(self.vocabulary, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator)


LAYERS = {
    "linear": Layer(lambda: nn.Linear(12, 8), (3, 5, 12)),
    "linear_nobias": Layer(lambda: nn.Linear(12, 8, bias=False), (3, 12)),
    "wide": Layer(lambda: nn.Linear(8, 20), (3, 8)),
    "conv1d_hf": Layer(lambda: hf_conv1d(8, 12), (3, 5, 12)),
    "conv1d": Layer(lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1), (3, 6, 11)),
    "conv1d_dilated": Layer(lambda: nn.Conv1d(6, 8, 3, dilation=2), (3, 6, 11)),
    "conv1d_pointwise": Layer(lambda: nn.Conv1d(6, 8, 1), (3, 6, 5)),
    "conv2d": Layer(lambda: nn.Conv2d(4, 8, (3, 2), stride=(1, 2), padding=(1, 0)), (3, 4, 7, 8)),
    "conv2d_dilated": Layer(lambda: nn.Conv2d(4, 8, (3, 2), padding=(1, 0), dilation=2), (3, 4, 7, 8)),
    "conv2d_grouped": Layer(lambda: nn.Conv2d(8, 8, 3, groups=2, bias=False), (3, 8, 5, 5)),
    "conv2d_pointwise": Layer(lambda: nn.Conv2d(8, 6, 1, stride=2), (3, 8, 5, 5)),
    "conv2d_square": Layer(lambda: nn.Conv2d(4, 8, 3, padding=1), (3, 4, 5, 5)),
    "conv3d": Layer(lambda: nn.Conv3d(4, 8, (2, 1, 3), padding=(0, 1, 1)), (2, 4, 3, 4, 3)),
    "conv3d_grouped": Layer(lambda: nn.Conv3d(4, 8, 2, groups=2), (2, 4, 3, 3, 3)),
    "embedding": Layer(lambda: nn.Embedding(11, 8), (3, 6), 11),
    "embedding_padding": Layer(lambda: nn.Embedding(11, 8, padding_idx=2), (3, 6), 11),
    "layernorm": Layer(lambda: nn.LayerNorm(12), (3, 5, 12)),
    "layernorm_two_axes": Layer(lambda: nn.LayerNorm((4, 3)), (5, 4, 3)),
    "rmsnorm": Layer(lambda: nn.RMSNorm(12), (3, 5, 12)),
    "groupnorm": Layer(lambda: nn.GroupNorm(2, 4), (3, 4, 5, 5)),
    "batchnorm": Layer(lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
}


def ours_of(config: Any) -> Any:
    """Return Inlay's config with the values of PEFT's."""
    fields = dataclasses.fields(config)
    usual = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
    values = {name: _plain(value) for name, value in vars(config).items()}
    given = {name: copy.deepcopy(value) for name, value in values.items() if usual.get(name, value) != value}
    return registry.config_class(config.peft_type.value)(**given)


def _plain(value: Any) -> Any:
    """PEFT's nested options as files have them."""
    nested = dataclasses.is_dataclass(value) and not isinstance(value, (peft.PeftConfig, peft.LoraRuntimeConfig, type))
    return dataclasses.asdict(value) if nested else value


def by_our_names(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return parameters by Inlay's names; what layers share is the model's there, and PEFT's first layer has it too."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) not in found or (name.startswith("base_model.") and not name.startswith(PREFIX)):
            found[id(p)] = (name.removeprefix(PREFIX).removeprefix("base_model."), p)
    return dict(found.values())


class Twins:
    """PEFT's model ``theirs`` and Inlay's ``ours``, with equal base weights and, after ``equalise``, adapters."""

    def __init__(self, layer: Layer, config: peft.PeftConfig, policy: Policy = INLAY, seed: int = 0) -> None:
        base = layer.model(seed)
        self.x = layer.input()
        self.ours = copy.deepcopy(base)
        self.base = copy.deepcopy(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mine = ours_of(config)
            self.theirs = peft.get_peft_model(base, config).eval()
            self.state: State = inject(plan(self.ours, mine, policy=policy))

    def their_parameters(self) -> dict[str, nn.Parameter]:
        return by_our_names(self.theirs)

    def equalise(self, size: float = 0.3) -> Twins:
        """Move PEFT's adapter off its initial values, and give Inlay's the same ones."""
        generator = torch.Generator().manual_seed(5)
        ours = dict(self.ours.named_parameters())
        with torch.no_grad():
            for name, parameter in self.their_parameters().items():
                if parameter.requires_grad:
                    parameter.add_(size * torch.randn(parameter.shape, generator=generator))
                    ours[name].copy_(parameter)
        return self

    def run(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the output and the gradients by parameter name (``x`` is the input)."""
        x = self.x.clone().requires_grad_() if self.x.is_floating_point() else self.x
        model.zero_grad()
        y = model(x)
        weights = torch.linspace(-1.0, 2.0, y.numel()).cos().view(y.shape)
        (y * weights).sum().backward()
        gradients = {name: p.grad for name, p in by_our_names(model).items() if p.grad is not None}
        if x.is_floating_point():
            assert x.grad is not None
            gradients["x"] = x.grad
        return y.detach(), gradients

    def merged(self) -> tuple[nn.Module, nn.Module]:
        """Return the plain models that merging leaves: PEFT's and ours."""
        theirs = copy.deepcopy(self.theirs).merge_and_unload()
        ours = copy.deepcopy(self.ours)
        state = next(m for m in ours.modules() if hasattr(m, "base_layer")).state
        merge(state)
        return theirs, eject(ours, state, restore=False)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
