"""L6: ``torch.compile(fullgraph=True)`` equals eager, forward and gradients, whichever adapters are active."""

from __future__ import annotations

from typing import Any

import cells
import pytest
import torch
from cells import ALL_CELLS, Cell
from subject import Subject, assert_same_outcome, outcome
from torch import Tensor

from inlay.core import inner
from inlay.core.affine import Delta, LowRank
from inlay.kernels.switch import without_fast_paths
from inlay.kernels.table import FAST, sum_of
from inlay.testing.laws import contexts

SLOW = True
STORAGES = ("plain_fp32",)


def test_compiled_equals_eager(cell: Cell) -> None:
    contexts.compiled_equals_eager(cell)


def fast_cell(path: tuple[str, type[Delta]]) -> Cell:
    """The first cell whose forward takes a fast path."""
    taken: list[str] = []
    function = FAST[path]

    def spy(*args: Any) -> Tensor:
        taken.append(path[0])
        return function(*args)

    def sum_spy(*args: Any) -> Tensor:
        taken.append(path[0])
        return sum_of(*args)

    with pytest.MonkeyPatch.context() as monkeypatch, without_fast_paths():  # compiled code takes no fused path
        monkeypatch.setitem(FAST, path, spy)
        if path == ("linear", LowRank):
            monkeypatch.setattr(inner, "sum_of", sum_spy)
        for cell in cells.every_cell(STORAGES):
            if cell.kind.startswith(path[0]):
                subject = Subject(cell)
                subject.model(subject.x)
            if taken:
                return cell
    raise AssertionError(f"no cell takes the fast path of {path[1].__name__} on {path[0]}")


@pytest.mark.parametrize("operator", sorted({operator.__name__ for _, operator in FAST}))
@pytest.mark.parametrize("kind", sorted({kind for kind, _ in FAST}))
def test_every_fast_path_under_the_inductor(kind: str, operator: str) -> None:
    """The inductor takes long, so ``make test`` asks it for the commonest path only."""
    path = next((path for path in FAST if path[0] == kind and path[1].__name__ == operator), None)
    if path is None:
        pytest.skip("no fast path of this kind and operator")
    if not ALL_CELLS and path != ("linear", LowRank):
        pytest.skip("only where INLAY_ALL_CELLS is set")
    cell = fast_cell(path)
    torch._dynamo.reset()
    subject = Subject(cell)
    compiled = torch.compile(subject.model, fullgraph=True, dynamic=False)
    assert_same_outcome(outcome(subject.model, subject.x, compiled), outcome(subject.model, subject.x), cell.dtype)
