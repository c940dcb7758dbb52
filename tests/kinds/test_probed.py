"""Layers of no known kind: what turns out to be affine is adapted, anything else is refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.errors import TargetError
from inlay.methods.ia3 import IA3Config
from inlay.methods.lora import LoraConfig
from inlay.methods.oft import OFTConfig


class Plain(nn.Module):
    """A linear layer as others write it."""

    def __init__(self, rows: int, columns: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.bias = nn.Parameter(torch.randn(self.out)) if bias else None

    @property
    def out(self) -> int:
        return len(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight) + (0.0 if self.bias is None else self.bias)


class Turned(Plain):
    @property
    def out(self) -> int:
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + (0.0 if self.bias is None else self.bias)


class Squared(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class Normalised(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return x @ nn.functional.normalize(self.weight, dim=1).T


class Noisy(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.1, self.training)


class Picky(Plain):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("needs an image")


def _model(layer: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"proj": layer})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer", [Plain, Turned])
@pytest.mark.parametrize("shape", [(6, 4), (4, 4)])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["proj"]),
        LoraConfig(r=2, use_dora=True, target_modules=["proj"]),
        OFTConfig(oft_block_size=2, target_modules=["proj"]),
        IA3Config(target_modules=["proj"], feedforward_modules=["proj"]),
    ],
    ids=["lora", "dora", "oft", "ia3"],
)
def test_what_is_affine_is_adapted(layer: Any, shape: tuple[int, int], bias: bool, config: Any) -> None:
    torch.manual_seed(0)
    own = layer(*shape, bias=bias)
    rows, columns = shape if layer is Plain else shape[::-1]
    twin = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        twin.weight.copy_(own.weight if layer is Plain else own.weight.T)
        if bias:
            twin.bias.copy_(own.bias)
    state = torch.get_rng_state()
    models = [_model(one).double() for one in (own, twin)]
    before = copy.deepcopy(own)
    states = [inject(plan(model, config), seed=3) for model in models]
    assert torch.equal(torch.get_rng_state(), state)
    for model in models:
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if ".default" in name:
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(i))
    trained = [{n: p for n, p in model.named_parameters() if ".default" in n} for model in models]
    assert {n: p.shape for n, p in trained[0].items()} == {n: p.shape for n, p in trained[1].items()}
    with torch.no_grad():
        for name, parameter in trained[0].items():
            parameter.copy_(trained[1][name])
    x = torch.randn(2, 3, columns, dtype=torch.float64)
    found, expected = (model["proj"](x) for model in models)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in trained[0].items():
        torch.testing.assert_close(parameter.grad, trained[1][name].grad)
    inject(plan(models[0], LoraConfig(r=1, target_modules=["proj"]), "second"), seed=3)  # it is there already
    merge(states[0])
    torch.testing.assert_close(models[0]["proj"](x), expected)
    unmerge(states[0])
    eject(models[0], states[0])
    assert models[0]["proj"] is own
    assert torch.equal(own.weight, before.weight)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Squared(4, 4), r"'proj' \(Squared\) is not affine: its output differs from x W\^T \+ b by"),
        (Normalised(6, 4, bias=False), r"'proj' \(Normalised\) is not affine"),
        (Noisy(6, 4), r"'proj' \(Noisy\) is not affine"),
        (Picky(6, 4), "takes no features of its weight's size: needs an image"),
        (nn.Bilinear(2, 3, 4), "is a Bilinear, which is no layer that can be adapted"),
        (nn.ReLU(), "is a ReLU, which is no layer that can be adapted"),
    ],
)
def test_anything_else_is_refused_by_name(layer: nn.Module, why: str) -> None:
    model = _model(layer)
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    with pytest.raises(TargetError, match=why):
        plan(model, LoraConfig(r=2, target_modules=["proj"]))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_nothing_is_tried_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = _model(Plain(6, 4))
    with pytest.raises(TargetError, match="on the meta device it cannot be tried"):
        plan(model, LoraConfig(r=2, target_modules=["proj"]))


def test_half_precision_is_tried_in_double() -> None:
    model = _model(Plain(64, 48)).bfloat16()
    made = plan(model, LoraConfig(r=2, target_modules=["proj"]))
    assert made.placements[0].site.out == 64
