"""The short way of a mixed batch without gradients: each sample as if alone, and whatever changes between two calls."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core import mixed
from inlay.core.active import set_active
from inlay.core.call import opened
from inlay.core.plan import plan
from inlay.core.ready_mixed import run_ready
from inlay.core.state import BASE, find_state

NAMES = ("b", BASE, "a", "b", "c", "a", "b")


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 6, bias=False))
    for name, r, targets in (("a", 2, ["0", "1"]), ("b", 5, ["0", "1"]), ("c", 3, ["0"])):
        config = inlay.LoraConfig(r=r, lora_alpha=7, target_modules=targets, init_lora_weights=False)
        inlay.inject(plan(model, config, name), seed=r)
    return model.to(dtype).eval()


def alone(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> Tensor:
    state = find_state(model)
    assert state is not None
    rows = []
    with inlay.without_fast_paths():
        for sample, name in zip(x, names, strict=True):
            set_active(state, [] if name == BASE else [name])
            rows.append(model(sample[None]))
    set_active(state, ["a"])
    return torch.cat(rows)


def together(model: nn.Module, x: Tensor, names: tuple[str, ...] = NAMES) -> tuple[Tensor, int]:
    """Return the outputs, and how many layers took the short way."""
    state, taken = find_state(model), []
    assert state is not None

    def noted(*given: Any) -> Tensor | None:
        y = run_ready(*given)
        taken.append(y is not None)
        return y

    with mock.patch.object(mixed, "run_ready", noted), opened(state, names=names):
        return model(x), sum(taken)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(7, 12), (7, 1, 12), (7, 3, 12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_each_sample_as_if_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    model = model_of(dtype)
    for x in (torch.randn(shape, dtype=dtype), torch.randn(*shape[:-1], 24, dtype=dtype)[..., ::2]):
        for names in (NAMES, tuple(sorted(NAMES)), ("c", BASE) * 3 + ("c",)):
            y, taken = together(model, x, names)
            within = 0.05 if dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(y, alone(model, x, names), rtol=within, atol=within)
            assert taken == (2 if "a" in names else 1)  # the second layer lacks c


@torch.no_grad()
def test_what_changes_between_two_calls_is_seen() -> None:
    model, x = model_of(), torch.randn(7, 12, dtype=torch.float64)
    together(model, x)
    layer: Any = model[0]
    layer.lora_A["b"].weight.data.mul_(2)
    layer.lora_B["a"].weight.data = torch.randn(10, 2, dtype=torch.float64)
    layer.lora_A["c"].weight = nn.Parameter(torch.randn(3, 12, dtype=torch.float64))
    layer.scaling["b"] = 0.3
    layer.base_layer.weight.mul_(1.5)
    y, taken = together(model, x)
    torch.testing.assert_close(y, alone(model, x, NAMES))
    assert taken == 2
    layer.base_layer.register_forward_hook(lambda module, given, output: output + 1)
    y, taken = together(model, x)
    torch.testing.assert_close(y, alone(model, x, NAMES))
    assert taken == 1


def test_it_is_not_for_training_or_gradients() -> None:
    model, x = model_of(), torch.randn(7, 12, dtype=torch.float64)
    assert together(model, x)[1] == 0
    with torch.no_grad():
        assert together(model.train(), x)[1] == 0
        with inlay.without_fast_paths():
            assert together(model.eval(), x)[1] == 0
