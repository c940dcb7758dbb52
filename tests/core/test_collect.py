"""Python's collection of cycles is held back while adapters are put in."""

from __future__ import annotations

import copy
import gc

import pytest
from torch import nn

import inlay
from inlay.models import operate


@pytest.mark.parametrize("low", [False, True])
def test_the_collector_does_not_run_while_adapters_are_put_in(low: bool) -> None:
    held = gc.get_threshold()
    config = inlay.LoraConfig(r=2, target_modules=["0", "1", "2"])
    model = inlay.get_peft_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), config)
    root, state = model.get_base_model(), model.base_model.state
    runs: list[str] = []

    def note(phase: str, found: dict[str, int]) -> None:
        runs.append(phase)

    gc.set_threshold(200, 5, 5)
    gc.callbacks.append(note)
    try:
        gc.collect()
        runs.clear()
        operate.add(root, copy.copy(config), "b", state=state, low_memory=low)
        assert not runs
        assert gc.isenabled()
        list(map(nn.Linear, [1] * 50, [1] * 50))  # what would have been seen
        assert runs
    finally:
        gc.callbacks.remove(note)
        gc.set_threshold(*held)
