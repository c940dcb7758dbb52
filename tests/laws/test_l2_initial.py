"""L2: a fresh adapter changes nothing, unless its config says so."""

from __future__ import annotations

import torch
from cells import CHANGES_AT_INIT, Cell
from subject import Subject, assert_close

from inlay.core.call import opened


def test_fresh_adapter_changes_nothing(cell: Cell) -> None:
    subject = Subject(cell, fresh=True)
    base = subject.base_output()
    fresh = subject.model(subject.x)
    if cell.method in CHANGES_AT_INIT:
        assert not torch.equal(fresh, base)
    else:
        assert_close(fresh, base, cell.dtype)


def test_the_same_seed_gives_the_same_adapter(cell: Cell) -> None:
    first, second = (dict(Subject(cell, fresh=True).model.state_dict()) for _ in range(2))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_switched_off_it_is_the_base_bitwise(cell: Cell) -> None:
    subject = Subject(cell)

    def is_base() -> bool:
        expected, found = subject.base_output(), subject.model(subject.x)
        if "max_norm" in cell.kind:  # each lookup rounds the rows that it reads, and not every method looks up the base
            return torch.allclose(found, expected, rtol=16 * torch.finfo(cell.dtype).eps, atol=0.0)
        return torch.equal(found, expected)

    assert not is_base()
    with opened(subject.state, disabled=True):
        assert is_base()
    subject.activate()
    assert is_base()
    subject.activate("one")
    assert not is_base()
    subject.state.enabled = False
    subject.state.touch()
    assert is_base()
