"""Laws of where a forward may run: L6 (compiled), L10 (mixed batches), L11 (gradient checkpointing)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inlay.core.call import opened
from inlay.core.state import BASE
from inlay.testing.subject import (
    Outcome,
    Subject,
    Trial,
    assert_close,
    assert_same_outcome,
    hold,
    loss,
    outcome,
    same_keys,
)

__all__ = [
    "checkpointed_equals_plain",
    "compiled_equals_eager",
    "each_sample_as_if_alone",
    "routed_as_if_alone",
    "routed_subject",
]


def compiled_equals_eager(cell: Trial) -> None:
    """L6: ``torch.compile(fullgraph=True)`` gives what eager code does, whichever adapters are active."""
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
    hold(not torch.equal(outputs[0], outputs[1]), "the second adapter changes nothing")
    hold(not torch.equal(outputs[0], outputs[2]), "the adapter changes nothing")


def routed_subject(cell: Trial) -> Subject:
    """Return a subject with three adapters, one of which only the last layer has."""
    subject = Subject(cell)
    subject.add("two")
    subject.add("elsewhere", layers=("last",))
    for parameter in subject.model.parameters():
        parameter.requires_grad_(False)
    subject.activate("one", "two", "elsewhere")
    return subject


# per sample: two methods, none at all, and ("elsewhere") an adapter that only the last layer has; two samples of each
BATCHES = (("two", "elsewhere", BASE, "one"), ("one", "two", "one", "two"))


def each_sample_as_if_alone(cell: Trial) -> None:
    """L10: a batch whose samples ask for different adapters equals each sample run alone, forward and gradients."""
    for names in BATCHES:
        routed_as_if_alone(cell, names)


def routed_as_if_alone(cell: Trial, names: tuple[str, ...]) -> None:
    """Run a batch whose samples ask for these adapters, and each sample alone."""
    everything = ("one", "two", "elsewhere")
    subject = routed_subject(cell)
    x = subject.x.clone().requires_grad_() if subject.x.is_floating_point() else subject.x

    def routed(x: Tensor) -> Tensor:
        with opened(subject.state, names=names):
            y: Tensor = subject.model(x)
            return y

    found = outcome(subject.model, x, routed)
    rows = []
    for row, name in enumerate(names):
        subject.activate(*([] if name == BASE else [name]))
        rows.append(subject.model(x.narrow(cell.axis, row, 1)))
    subject.activate(*everything)
    y = torch.cat(rows, dim=cell.axis)
    if y.requires_grad:
        loss(y).backward()
    expected = {name: p.grad for name, p in subject.model.named_parameters() if p.grad is not None}
    if x.grad is not None:
        expected["x"] = x.grad
    assert_close(found.y, y, cell.dtype)
    same_keys(found.gradients, expected, "tensors with a gradient")
    for name, gradient in expected.items():
        assert_close(found.gradients[name], gradient, cell.dtype, f"gradient of {name}", ulps=64)


def checkpointed_equals_plain(cell: Trial) -> None:
    """L11: gradients under gradient checkpointing are those without, reentrant or not."""
    subject = routed_subject(cell)
    # indices cannot need a gradient, and the reentrant mode wants an input that does
    gate = torch.ones((), dtype=cell.dtype, requires_grad=True)

    def block(x: Tensor, one: Tensor) -> Tensor:
        y: Tensor = subject.model(x) * one
        return y

    def run(forward: Callable[[Tensor, Tensor], Tensor]) -> Outcome:
        def called(x: Tensor) -> Tensor:
            with opened(subject.state, names=("two", "one", BASE, "elsewhere")):
                return forward(x, gate)

        return outcome(subject.model, subject.x, called)

    expected = run(block)
    for reentrant in (True, False):
        found = run(partial(checkpoint, block, use_reentrant=reentrant))
        assert_same_outcome(found, expected, cell.dtype, ulps=4096)
