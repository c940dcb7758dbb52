"""L8: gradients of ``forward`` equal those through ``rewrite``, in float64."""

from __future__ import annotations

import pytest
import torch
from cells import CHANGES_AT_INIT, Cell, family
from subject import Subject, assert_close, loss, outcome
from torch import Tensor

from inlay.core.layer import AdaptedLayer

STORAGES = ("plain_fp64",)


def through_weights(subject: Subject, x: Tensor) -> Tensor:
    """The untouched model run by torch alone, with the weights that ``rewrite`` gives, as functions of the adapter."""
    tensors: dict[str, Tensor] = {}
    for layer in subject.state.layers():
        assert isinstance(layer, AdaptedLayer)
        stored = layer.kind.stored(layer.leaf_layer, layer.site, layer.fold(layer.chain()))
        tensors |= {f"{layer.site.owner}.{name}": tensor for name, tensor in stored.items()}
    return torch.func.functional_call(subject.untouched, tensors, (x,))


def subject_of(cell: Cell) -> Subject:
    """Without padding tokens, whose gradients torch cuts off wherever it meets them; see the last test."""
    subject = Subject(cell)
    if cell.case.padding is not None:
        subject.x[subject.x == cell.case.padding] = 5
    return subject


@pytest.mark.parametrize("names", [("one",), ("one", "two"), ("two", "one")], ids="-".join)
def test_gradients_are_those_through_the_rewritten_weight(cell: Cell, names: tuple[str, ...]) -> None:
    if cell.unmergeable:
        pytest.skip(cell.unmergeable)
    subject = subject_of(cell)
    subject.add("two")
    subject.activate(*names)
    found = outcome(subject.model, subject.x)
    expected = outcome(subject.model, subject.x, lambda x: through_weights(subject, x))
    assert_close(found.y, expected.y, cell.dtype, ulps=1000)
    # what the forward never reaches has no gradient, what the weight form reaches in vain has a zero one
    for name, gradient in expected.gradients.items():
        if name not in found.gradients:
            assert not gradient.any(), name
            continue
        assert_close(found.gradients[name], gradient, cell.dtype, f"gradient of {name}", ulps=1000, size=1e-3)
    assert found.gradients.keys() <= expected.gradients.keys()
    # each trainable tensor of every active adapter is reached
    trained = {
        name for name, p in subject.model.named_parameters() if p.requires_grad and not name.startswith("beside")
    }
    assert trained == found.gradients.keys() - {"x"}


def test_numeric_gradient(cell: Cell) -> None:
    """The same by finite differences, along one random direction of all adapter tensors that no detach cuts off."""
    if cell.method == "dora":
        pytest.skip("DoRA holds its norm constant in backward on purpose")
    subject = subject_of(cell)
    parameters = {n: p for n, p in subject.model.named_parameters() if p.requires_grad}
    found = outcome(subject.model, subject.x).gradients
    generator = torch.Generator().manual_seed(3)
    way = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    slope = sum(float((found[n] * way[n]).sum()) for n in way if n in found)
    step = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in parameters.items():
                p.add_(sign * step * way[n])
            values.append(float(loss(subject.model(subject.x))))
            for n, p in parameters.items():
                p.sub_(sign * step * way[n])
    measured = (values[0] - values[1]) / (2 * step)
    assert abs(measured) > 1e-3
    assert abs(slope - measured) <= 1e-5 * max(1.0, abs(measured))


def test_padding_row_is_never_trained(cell: Cell) -> None:
    """As in torch, a padding token trains nothing: a fresh adapter that is trained leaves its row alone."""
    if cell.case.padding is None:
        pytest.skip("no padding here")
    if cell.method in CHANGES_AT_INIT or family(cell.method) in ("VERA", "FOURIERFT"):
        pytest.skip("a random start, or an update that has no rows of its own, changes the padding row as well")
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
