"""Dropout of an adapter's input: PEFT draws for every layer and drops DoRA's base product too; Inlay does neither."""

from __future__ import annotations

import copy

import peft
import torch
from torch import Tensor, nn

import inlay
from inlay.compat import peft as stand_in

P = 0.1
DRAWN = 26 / 256  # the multiple of 1/256 that stands for P


class Pair(nn.Module):
    """Two layers that read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x), self.k(x)


def dropped_inputs(library: object) -> tuple[Tensor, Tensor]:
    """Return what the update of each layer read: W = 0 and B A = 1, so the output is the dropped input."""
    base = Pair()
    config = library.LoraConfig(r=64, lora_alpha=64, lora_dropout=P, target_modules=["q", "k"])  # type: ignore[attr-defined]
    model = library.get_peft_model(base, config)  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.eye(64) if "lora_" in name else torch.zeros(64, 64))
    torch.manual_seed(3)
    return model.train()(torch.ones(50, 64))


def test_layers_that_read_the_same_tensor_share_a_mask() -> None:
    q, k = dropped_inputs(peft)
    assert not torch.equal(q == 0, k == 0)
    assert torch.equal(q.unique(), torch.tensor([0.0, 1 / (1 - P)]))

    q, k = dropped_inputs(inlay)
    assert torch.equal(q == 0, k == 0)
    torch.testing.assert_close(q.unique(), torch.tensor([0.0, 1 / (1 - DRAWN)]))
    assert abs((q == 0).float().mean().item() - DRAWN) < 0.03

    for ours, theirs in zip(dropped_inputs(stand_in), dropped_inputs(peft), strict=True):
        assert torch.equal(ours, theirs)  # the drop-in draws as PEFT does


def test_doras_dropout_acts_on_the_low_rank_update_alone() -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(5, 16)
    expected = 2 * (base[0](x) - base[0].bias) + base[0].bias

    def outputs(library: object) -> list[Tensor]:
        config = library.LoraConfig(r=2, lora_dropout=0.5, use_dora=True, target_modules=["0"])  # type: ignore[attr-defined]
        model = library.get_peft_model(copy.deepcopy(base), config).train()  # type: ignore[attr-defined]
        with torch.no_grad():  # B is zero, so all that is left to drop is the input of the base product
            for name, parameter in model.named_parameters():
                if "magnitude" in name:
                    parameter.mul_(2)
        return [model(x) for _ in range(3)]

    first, *others = outputs(peft)
    assert not any(torch.allclose(first, other) for other in others)
    for y in outputs(inlay):
        torch.testing.assert_close(y, expected)
    torch.manual_seed(1)
    theirs = outputs(peft)
    torch.manual_seed(1)
    for ours, reference in zip(outputs(stand_in), theirs, strict=True):
        torch.testing.assert_close(ours, reference)
