"""L6: ``torch.compile(fullgraph=True)`` equals eager, forward and gradients, whichever adapters are active."""

from __future__ import annotations

import torch
from cells import Cell
from subject import Subject, assert_same_outcome, outcome

SLOW = True
STORAGES = ("plain_fp32",)


def test_compiled_equals_eager(cell: Cell) -> None:
    torch._dynamo.reset()
    subject = Subject(cell)
    subject.add("two")
    compiled = torch.compile(subject.model, fullgraph=True, backend="aot_eager", dynamic=False)
    outputs = []
    for names in (("one",), ("one", "two"), ()):
        subject.activate(*names)
        eager = outcome(subject.model, subject.x)
        assert_same_outcome(outcome(subject.model, subject.x, compiled), eager, cell.dtype)
        outputs.append(eager.y)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
