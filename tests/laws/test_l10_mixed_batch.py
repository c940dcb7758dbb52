"""L10: a batch whose samples ask for different adapters equals each sample run alone, forward and gradients."""

from __future__ import annotations

import pytest
import torch
from cells import BATCH, Cell
from subject import Outcome, Subject, assert_close, assert_same_outcome, loss, outcome
from torch import Tensor

from inlay.core.call import call_of, opened
from inlay.core.state import BASE
from inlay.errors import RoutingError

# per sample: two methods, none at all, and ("elsewhere") an adapter that only the last layer has
NAMES = ("two", "elsewhere", BASE, "one")


def subject_of(cell: Cell) -> Subject:
    subject = Subject(cell)
    subject.add("two")
    subject.add("elsewhere", layers=("last",))
    subject.state.active = ("one", "two", "elsewhere")
    for parameter in subject.model.parameters():
        parameter.requires_grad_(False)
    subject.activate("one", "two", "elsewhere")
    return subject


def sample(cell: Cell, x: Tensor, row: int) -> Tensor:
    return x.narrow(cell.case.axis, row, 1)


def one_by_one(subject: Subject, names: tuple[str, ...]) -> Tensor:
    """Every sample on its own, with its own adapter active (or none) in the ordinary way."""
    rows = []
    for row, name in enumerate(names):
        x = sample(subject.cell, subject.x, row)
        subject.activate(*([] if name == BASE else [name]))
        rows.append(subject.model(x))
    subject.activate("one", "two", "elsewhere")
    return torch.cat(rows, dim=subject.cell.case.axis)


@pytest.mark.parametrize(
    "names",
    [NAMES, ("one", "two", "one", "two"), (BASE,) * BATCH, ("elsewhere",) * BATCH],
    ids=["all", "two", "none", "same"],
)
def test_each_sample_as_if_alone(cell: Cell, names: tuple[str, ...]) -> None:
    subject = subject_of(cell)
    x = subject.x.clone().requires_grad_() if subject.x.is_floating_point() else subject.x
    subject.x = x

    def routed() -> Outcome:
        def run(x: Tensor) -> Tensor:
            with opened(subject.state, names=names):
                return subject.model(x)

        return outcome(subject.model, x, run)

    found = routed()
    subject.x = x
    y = one_by_one(subject, names)
    parameters = dict(subject.model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = None
    if y.requires_grad:
        loss(y).backward()
    expected = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert_close(found.y, y, cell.dtype)
    assert expected.keys() == found.gradients.keys() - {"x"}
    for name, gradient in expected.items():
        assert_close(found.gradients[name], gradient, cell.dtype, f"gradient of {name}", ulps=64)
    if x.is_floating_point():
        assert x.grad is not None
        assert_close(found.gradients["x"], x.grad, cell.dtype, "gradient of the input", ulps=64)


def test_the_call_ends_with_the_block_and_leaves_no_trace(cell: Cell) -> None:
    subject = subject_of(cell)
    before = outcome(subject.model, subject.x)
    with pytest.raises(ZeroDivisionError):
        _interrupted(subject)
    assert call_of(subject.state) is None
    after = outcome(subject.model, subject.x)
    assert_same_outcome(after, before, cell.dtype, ulps=4 if "max_norm" in cell.kind else 0)


def test_as_many_names_as_samples_are_needed(cell: Cell) -> None:
    subject = subject_of(cell)
    with opened(subject.state, names=("one", "two")), pytest.raises(RoutingError, match="2 samples"):
        subject.model(subject.x)


def _interrupted(subject: Subject) -> None:
    with opened(subject.state, names=NAMES):
        subject.model(subject.x)
        raise ZeroDivisionError
