"""L9: inject, train, eject: the very same modules, weights, ``requires_grad`` and training flags."""

from __future__ import annotations

import torch
from cells import Cell
from subject import perturb

from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.testing.laws import keeping


def test_eject_gives_back_the_model(cell: Cell) -> None:
    keeping.eject_gives_back_the_model(cell)


def test_an_ejected_model_takes_adapters_again(cell: Cell) -> None:
    model, x = cell.model(), cell.batch()
    outputs = []
    for _ in range(2):
        state = inject(plan(model, cell.config(), "one"), seed=7)
        perturb(state, "one")
        outputs.append(model(x).detach())
        eject(model, state)
    assert torch.equal(*outputs) or "max_norm" in cell.kind
