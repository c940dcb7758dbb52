"""L8: gradients of ``forward`` equal those through ``rewrite``, in float64."""

from __future__ import annotations

import pytest
import torch
from cells import CHANGES_AT_INIT, Cell, family, method_of
from subject import Subject, loss

from inlay.testing.laws import forward

STORAGES = ("plain_fp64",)
# methods whose update has no rows of its own: each of its numbers belongs to several tokens
_DENSE = {
    *("VERA", "PVERA", "RANDLORA", "TINYLORA", "FOURIERFT", "GLORA", "PSOFT", "BEFT", "ADALORA", "ADAMSS", "FROD"),
    *("OSF", "LILY", "POLY", "LOKR", "C3A", "GRALORA", "MISS"),
}
# the like, where other forms of the method have rows; of an orthogonal start A has values for every token
_DENSE_FORMS = {"lora_qa", "waveft", "lora_orthogonal"}


@pytest.mark.parametrize("names", [("one",), ("one", "two"), ("two", "one")], ids="-".join)
def test_gradients_are_those_through_the_rewritten_weight(cell: Cell, names: tuple[str, ...]) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    forward.gradients_are_those_through_the_rewritten_weight(cell, names)


def test_numeric_gradient(cell: Cell) -> None:
    if not cell.numeric:
        pytest.skip("something is held constant in backward on purpose")
    forward.numeric_gradient(cell)


def test_padding_row_is_never_trained(cell: Cell) -> None:
    """As in torch, a padding token trains nothing: a fresh adapter that is trained leaves its row alone."""
    if cell.case.padding is None:
        pytest.skip("no padding here")
    own_rows = family(cell.method) not in _DENSE and cell.method not in _DENSE_FORMS
    if cell.method in CHANGES_AT_INIT or not own_rows or method_of(cell.method).rebases:
        pytest.skip("a start that is not zero, or an update without rows of its own, changes the padding row as well")
    subject = Subject(cell, fresh=True)
    row = torch.full((1, 1), cell.case.padding)
    before = subject.model(row).detach()
    optimiser = torch.optim.SGD([p for p in subject.model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        loss(subject.model(subject.x)).backward()
        optimiser.step()
    assert not torch.equal(subject.model(subject.x), subject.base_output())
    assert torch.equal(subject.model(row), before)
