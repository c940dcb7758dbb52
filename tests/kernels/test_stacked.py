"""Stacks of the factors of several adapters: equal to what they are made from, and never older."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from mixed_batches import MIXED, OUT, TOLERANCE, WIDTH, alone, assert_equal, batch, subject
from torch import nn

from inlay.core.call import call_of, opened
from inlay.core.state import State
from inlay.kernels.stacked import Stack


def stacks(state: State) -> list[Any]:
    call = call_of(state)
    assert call is not None
    assert call.routes is not None
    return list(call.routes.stacks.values())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("names", [MIXED, ("a", "b", "c"), ("a", "a", "b", "b"), ("b", "a") * 3], ids=len)
def test_a_batch_that_comes_again_is_served_by_a_stack(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    model, state = subject(dtype)
    x = batch(dtype, 2, samples=len(names)).detach()
    with torch.no_grad():
        with opened(state, names=names):
            first = model(x)
            assert not any(isinstance(stack, Stack) for stack in stacks(state))
            again = [model(x) for _ in range(2)]
            assert all(isinstance(stack, Stack) for stack in stacks(state))
        with opened(state, names=names), alone():
            expected = model(x)
    for y in (first, *again):
        assert_equal({"y": y}, {"y": expected}, TOLERANCE[dtype])


def test_a_stack_notices_what_its_factors_have_become() -> None:
    model, state = subject()
    layer: Any = model.last
    x = torch.randn(3, OUT, dtype=torch.float64)
    weight = layer.lora_A["a"].weight

    def in_place() -> None:
        weight.mul_(2)

    def other_parameter() -> None:
        layer.lora_A["a"].weight = nn.Parameter(torch.randn_like(weight))

    def assigned() -> None:
        tensors = {name: torch.randn_like(tensor) for name, tensor in layer.lora_B["b"].state_dict().items()}
        layer.lora_B["b"].load_state_dict(tensors, assign=True)

    def scaled() -> None:
        layer.scaling["c"] = 7.0

    with torch.no_grad(), opened(state, names=("a", "b", "c")):
        for change in (in_place, other_parameter, assigned, scaled):
            before = [layer(x) for _ in range(3)][-1]
            assert isinstance(stacks(state)[0], Stack)
            change()
            for _ in range(3):
                y = layer(x)
                with alone():
                    torch.testing.assert_close(y, layer(x))
            assert not torch.allclose(y, before)


def test_a_stack_ends_with_its_call_and_holds_no_adapter() -> None:
    model, state = subject()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with torch.no_grad(), opened(state, names=("a", "b", "c")):
        for _ in range(3):
            model(x)
        held = [weakref.ref(stack.A) for stack in stacks(state)]
        factor = weakref.ref(model.last.lora_A["a"].weight)
        copied = copy.deepcopy(model)
        assert copied.last.lora_A["a"].weight.data_ptr() != model.last.lora_A["a"].weight.data_ptr()
        model.last.delete_adapter("a")
        gc.collect()
        assert factor() is None
    gc.collect()
    assert all(ref() is None for ref in held)


def test_no_stack_where_gradients_are_wanted() -> None:
    model, state = subject()
    x = batch(torch.float64, 1)
    with opened(state, names=MIXED):
        for _ in range(3):
            model(x)
        assert not any(isinstance(stack, Stack) for stack in stacks(state))
