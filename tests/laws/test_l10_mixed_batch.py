"""L10: a batch whose samples ask for different adapters equals each sample run alone, forward and gradients."""

from __future__ import annotations

import pytest
from cells import BATCH, Cell
from subject import Subject, assert_same_outcome, outcome

from inlay.core.call import call_of, opened
from inlay.core.state import BASE
from inlay.errors import RoutingError
from inlay.testing.laws import contexts
from inlay.testing.laws.contexts import routed_subject

NAMES = contexts.BATCHES[0]


@pytest.mark.parametrize(
    "names",
    [*contexts.BATCHES, (BASE,) * BATCH, ("elsewhere",) * BATCH],
    ids=["all", "two", "none", "same"],
)
def test_each_sample_as_if_alone(cell: Cell, names: tuple[str, ...]) -> None:
    contexts.routed_as_if_alone(cell, names)


def test_the_call_ends_with_the_block_and_leaves_no_trace(cell: Cell) -> None:
    subject = routed_subject(cell)
    before = outcome(subject.model, subject.x)
    with pytest.raises(ZeroDivisionError):
        _interrupted(subject)
    assert call_of(subject.state) is None
    after = outcome(subject.model, subject.x)
    assert_same_outcome(after, before, cell.dtype, ulps=4 if "max_norm" in cell.kind else 0)


def test_as_many_names_as_samples_are_needed(cell: Cell) -> None:
    subject = routed_subject(cell)
    with opened(subject.state, names=("one", "two")), pytest.raises(RoutingError, match="2 samples"):
        subject.model(subject.x)


def _interrupted(subject: Subject) -> None:
    with opened(subject.state, names=NAMES):
        subject.model(subject.x)
        raise ZeroDivisionError
