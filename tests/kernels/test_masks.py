"""Cheap dropout masks: how often they keep, how they scale, and that a seed gives them again."""

from __future__ import annotations

import math

import pytest
import torch
from lowrank_models import WIDTH, adapted, batch, linear, run

import inlay.core.sharing as sharing
from inlay.kernels.masks import Mask, drawn_probability


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "drawn again"])
def test_frequency_and_scale(p: float, again: bool) -> None:
    torch.manual_seed(0)
    n = 400_000
    mask = Mask(torch.empty(n), p, again=again)
    bits = mask.bits()
    assert set(bits.unique().tolist()) <= {0, 1}
    drawn = 1 - 1 / mask.scale
    assert abs(drawn - p) <= 0.021 * min(p, 1 - p)
    kept = float(bits.float().mean())
    assert abs(kept - (1 - drawn)) <= 5 * math.sqrt(drawn * (1 - drawn) / n)
    assert abs(kept * mask.scale - 1) <= 5 * math.sqrt(drawn / (1 - drawn) / n)  # the expectation is kept


@pytest.mark.parametrize(("p", "levels"), [(0.1, 256), (0.5, 256), (0.05, 256), (0.001, 65536), (0.999, 65536)])
def test_a_probability_that_bytes_miss_takes_two(p: float, levels: int) -> None:
    dropped, found = drawn_probability(p)
    assert found == levels
    assert 0 < dropped < levels


@pytest.mark.parametrize("p", [0.1, 0.001])
def test_neighbours_are_drawn_independently(p: float) -> None:
    """Eight elements share a word of random bits, and none of them tells of another."""
    torch.manual_seed(0)
    dropped = 1 - Mask(torch.empty(800_000), p).bits().double()
    rate = float(dropped.mean())
    for distance in (1, 2, 3, 4, 7, 8):
        both = float((dropped[distance:] * dropped[:-distance]).mean())
        assert abs(both - rate**2) <= 5 * math.sqrt(rate**2 / 800_000), distance


@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("p", [0.5, 0.001])
def test_shapes(shape: tuple[int, ...], p: float) -> None:
    for again in (False, True):
        bits = Mask(torch.empty(shape), p, again=again).bits()
        assert bits.shape == shape
        assert bits.dtype == torch.uint8


@pytest.mark.parametrize("again", [False, True], ids=["kept", "drawn again"])
def test_seeds(again: bool) -> None:
    def draw(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [Mask(torch.empty(64, 8), 0.5, again=again).bits() for _ in range(2)]

    first, second = draw(1)
    assert not torch.equal(first, second)
    assert all(map(torch.equal, draw(1), (first, second)))
    assert not torch.equal(draw(2)[0], first)


def test_drawing_again_gives_the_same_and_leaves_the_stream_alone() -> None:
    torch.manual_seed(0)
    mask = Mask(torch.empty(64, 8), 0.3, again=True)
    assert mask.kept is None
    before = torch.get_rng_state()
    first = mask.bits()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(mask.bits(), first)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "drawn again"])
def test_backward_drops_what_forward_dropped(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With B A = s I / s the layer's update is the dropped input itself, and its gradient shows the mask."""
    made: list[Mask] = []

    def record(x: torch.Tensor, p: float) -> Mask:
        made.append(Mask(x, p, again=again))
        return made[-1]

    monkeypatch.setattr(sharing, "Mask", record)
    model, _ = adapted(linear(), lora_dropout=0.5)
    x = batch(9, WIDTH)
    found = run(model.train(), x)
    (mask,) = made
    (A,), (B,) = ([p for n, p in model.named_parameters() if part in n] for part in ("lora_A", "lora_B"))
    scaling, base = model.layer.scaling["number0"], model.layer.base_layer
    inner = x.clone().requires_grad_()
    y = base(inner) + scaling * ((inner * mask.bits() * mask.scale) @ A.mT) @ B.mT
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).cos().view(y.shape)
    gx, gA, gB = torch.autograd.grad((y * weights).sum(), (inner, A, B))
    torch.testing.assert_close(found["y"], y.detach())
    torch.testing.assert_close(found["x"], gx)
    torch.testing.assert_close(found["layer.lora_A.number0.weight"], gA)
    torch.testing.assert_close(found["layer.lora_B.number0.weight"], gB)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_model_on_the_meta_device_drops_as_well(variant: str) -> None:
    model, _ = adapted(linear(), variant, lora_dropout=0.5)
    model.to("meta").train()
    y = model(torch.empty(4, WIDTH, device="meta", dtype=torch.float64))
    assert y.is_meta
    assert y.shape == (4, 10)
