"""Transposed convolutions beyond what the laws try: a size chosen by the call, and how much a low-rank update costs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from inlay.core.call import opened
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.methods.loha import LoHaConfig
from inlay.methods.lora import LoraConfig
from inlay.methods.oft import OFTConfig


def _adapted(config: Any, layer: nn.Module) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": layer.double()})
    state = inject(plan(model, config, "one"), seed=1)
    for name, parameter in model.named_parameters():
        if "one" in name:
            nn.init.normal_(parameter, std=0.3)
    return model, state


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["up"]),
        LoHaConfig(r=2, target_modules=["up"]),
        OFTConfig(oft_block_size=4, target_modules=["up"]),
    ],
    ids=lambda config: config.peft_type.value,
)
@pytest.mark.parametrize("size", [(9, 7), (10, 8)])
@torch.no_grad()
def test_the_size_that_a_call_asks_for(config: Any, size: tuple[int, int]) -> None:
    model, state = _adapted(config, nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1))
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    found = model["up"](x, output_size=size)
    assert found.shape == (2, 6, *size)
    assert torch.equal(model["up"](x, list(size)), found)
    with opened(state, names=("one", "__base__")):
        mixed = model["up"](x, size)
    torch.testing.assert_close(mixed[0], found[0])
    plain = copy.deepcopy(model)
    merge(state, keep="none")
    eject(model, state, restore=False)
    torch.testing.assert_close(model["up"](x, output_size=size), found)
    with pytest.raises(ValueError, match="output size"):
        plain["up"](x, (12, 12))


@torch.no_grad()
def test_a_low_rank_update_never_makes_its_weight() -> None:
    layer = nn.ConvTranspose2d(64, 64, 3, stride=2)
    with FlopCounterMode(display=False) as base:
        layer(torch.randn(1, 64, 8, 8))
    model, _ = _adapted(LoraConfig(r=2, target_modules=["up"]), layer)
    with FlopCounterMode(display=False) as adapted:
        model["up"](torch.randn(1, 64, 8, 8, dtype=torch.float64))
    added = adapted.get_total_flops() - base.get_total_flops()
    assert added < 0.15 * base.get_total_flops()
