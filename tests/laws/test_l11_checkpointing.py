"""L11: under either gradient checkpointing mode, gradients are those without it, whatever was chosen for the call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from cells import Cell
from subject import Outcome, Subject, assert_same_outcome, loss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from inlay.core.active import set_active
from inlay.core.call import call_of, opened
from inlay.core.state import BASE

SLOW = True
STORAGES = ("plain_fp32",)
# A recomputed block adds its gradients up in another order, and sums over whole outputs (the gate's gradient) cancel.
# Recomputing with the wrong adapters is off by tenths, a thousand times this.
ORDER = 4096

MODES = [pytest.param(True, id="reentrant"), pytest.param(False, id="not_reentrant")]
CALLS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "routed": {"names": ("two", "one", BASE, "elsewhere")},
    "switched_off": {"disabled": True},
}
Forward = Callable[[Tensor, Tensor], Tensor]


def subject_of(cell: Cell) -> Subject:
    subject = Subject(cell)
    subject.add("two")
    subject.add("elsewhere", layers=("last",))
    subject.activate("one", "two", "elsewhere")
    return subject


def called(subject: Subject, call: dict[str, Any] | None) -> AbstractContextManager[Any]:
    return nullcontext() if call is None else opened(subject.state, **call)


def gate(subject: Subject) -> Tensor:
    """A factor that needs a gradient: the reentrant mode wants an input that does, and indices cannot."""
    return torch.ones((), dtype=subject.cell.dtype, requires_grad=True)


def block_of(subject: Subject, wrap: Callable[[Forward], Forward]) -> Forward:
    """The model with a gate at each layer; ``wrap`` may checkpoint the layers."""
    model = subject.model
    first = wrap(lambda x, one: model.call(model.first, x) * one)
    last = wrap(lambda x, one: model.call(model.last, x) * one)
    return lambda x, one: first(x, one).tanh() + last(x, one).sin()


def plain(subject: Subject) -> Forward:
    return block_of(subject, lambda layer: layer)


def flat(subject: Subject, reentrant: bool) -> Forward:
    return partial(checkpoint, plain(subject), use_reentrant=reentrant)


def nested(subject: Subject, outer: bool, inner: bool) -> Forward:
    """A checkpoint around the model, and one around each layer inside it."""
    block = block_of(subject, lambda layer: partial(checkpoint, layer, use_reentrant=inner))
    return partial(checkpoint, block, use_reentrant=outer)


def ways(subject: Subject, reentrant: bool) -> list[Forward]:
    return [flat(subject, reentrant), nested(subject, reentrant, reentrant), nested(subject, reentrant, not reentrant)]


def run(subject: Subject, forward: Forward, calls: list[dict[str, Any] | None], threaded: bool = False) -> Outcome:
    """One forward per call, each under its own call that has ended when the one backward starts."""
    parameters = {name: p for name, p in subject.model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    x = subject.x.clone().requires_grad_() if subject.x.is_floating_point() else subject.x
    one = gate(subject)
    outputs = []
    for call in calls:
        with called(subject, call):
            outputs.append(forward(x, one))
    assert call_of(subject.state) is None
    y = torch.stack(outputs)
    if threaded:
        thread = threading.Thread(target=lambda: loss(y).backward())
        thread.start()
        thread.join()
    else:
        loss(y).backward()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert one.grad is not None
    gradients["gate"] = one.grad
    if x.is_floating_point():
        assert x.grad is not None
        gradients["x"] = x.grad
    for parameter in parameters.values():
        parameter.grad = None
    return Outcome(y.detach(), gradients)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("reentrant", MODES)
def test_checkpointed_equals_plain(cell: Cell, reentrant: bool, call: str) -> None:
    subject = subject_of(cell)
    expected = run(subject, plain(subject), [CALLS[call]])
    for forward in ways(subject, reentrant):
        assert_same_outcome(run(subject, forward, [CALLS[call]]), expected, cell.dtype, ORDER)


@pytest.mark.parametrize("reentrant", MODES)
def test_two_forwards_under_different_calls_before_one_backward(cell: Cell, reentrant: bool) -> None:
    subject = subject_of(cell)
    calls = list(CALLS.values())
    expected = run(subject, plain(subject), calls)
    for forward in ways(subject, reentrant):
        assert_same_outcome(run(subject, forward, calls), expected, cell.dtype, ORDER)
        assert_same_outcome(
            run(subject, forward, calls[::-1]), run(subject, plain(subject), calls[::-1]), cell.dtype, ORDER
        )


@pytest.mark.parametrize("reentrant", MODES)
def test_backward_in_another_thread(cell: Cell, reentrant: bool) -> None:
    subject = subject_of(cell)
    calls = [CALLS["routed"], CALLS["switched_off"]]
    expected = run(subject, plain(subject), calls)
    for forward in ways(subject, reentrant):
        assert_same_outcome(run(subject, forward, calls, threaded=True), expected, cell.dtype, ORDER)


@pytest.mark.parametrize("reentrant", MODES)
def test_backward_inside_another_call(cell: Cell, reentrant: bool) -> None:
    """A call that is open when backward runs is not the one that the recomputed block belongs to."""
    subject = subject_of(cell)
    expected = run(subject, plain(subject), [CALLS["routed"]])
    forward = flat(subject, reentrant)

    x = subject.x.clone().requires_grad_() if subject.x.is_floating_point() else subject.x
    one = gate(subject)
    with called(subject, CALLS["routed"]):
        y = forward(x, one).unsqueeze(0)
    with opened(subject.state, disabled=True):
        loss(y).backward()
    assert one.grad is not None
    found = {name: p.grad for name, p in subject.model.named_parameters() if p.grad is not None} | {"gate": one.grad}
    if x.is_floating_point():
        assert x.grad is not None
        found["x"] = x.grad
    assert_same_outcome(Outcome(y.detach(), found), expected, cell.dtype, ORDER)


@pytest.mark.parametrize("reentrant", MODES)
def test_switching_adapters_between_forward_and_backward(cell: Cell, reentrant: bool) -> None:
    """A block is recomputed with the adapters that it ran with."""
    outcomes = []
    for checkpointed in (False, True):
        subject = subject_of(cell)
        subject.model.train()
        forward = flat(subject, reentrant) if checkpointed else plain(subject)
        x = subject.x.clone().requires_grad_() if subject.x.is_floating_point() else subject.x
        one = gate(subject)
        torch.manual_seed(3)  # for methods that draw noise in training
        y = forward(x, one).unsqueeze(0)
        set_active(subject.state, ["two"])  # which tensors train stays as it is, or torch itself would refuse
        loss(y).backward()
        assert one.grad is not None
        named = subject.model.named_parameters()
        gradients = {name: p.grad for name, p in named if p.grad is not None} | {"gate": one.grad}
        outcomes.append(Outcome(y.detach(), gradients))
    assert_same_outcome(outcomes[1], outcomes[0], cell.dtype, ORDER)


def test_the_calls_matter(cell: Cell) -> None:
    """Each call gives an output of its own, so the tests above can tell them apart."""
    subject = subject_of(cell)
    outputs = [run(subject, plain(subject), [call]).y for call in CALLS.values()]
    for i, y in enumerate(outputs):
        assert not any(torch.equal(y, other) for other in outputs[:i])
