"""Laws of the forward pass: L1 (weights), L2 (the start), L8 (gradients)."""

from __future__ import annotations

import torch
from torch import Tensor

from inlay.core.call import opened
from inlay.testing.subject import (
    Subject,
    Trial,
    assert_bitwise,
    assert_close,
    exact_input,
    hold,
    loss,
    outcome,
    same_keys,
    written,
)

__all__ = [
    "forward_is_the_layer_with_rewritten_weights",
    "fresh_adapter_changes_nothing",
    "gradients_are_those_through_the_rewritten_weight",
    "numeric_gradient",
    "same_seed_gives_the_same_adapter",
    "switched_off_it_is_the_base",
    "two_methods_on_one_layer",
    "without_padding",
]


def forward_is_the_layer_with_rewritten_weights(cell: Trial) -> None:
    """L1: the adapted model gives what plain layers give that hold the result of ``rewrite``."""
    if cell.unmergeable:
        return
    subject = Subject(cell)
    expected = written(subject.exact())(exact_input(subject.x))
    assert_close(subject.model(subject.x), expected, cell.dtype, size=subject.largest())


def two_methods_on_one_layer(cell: Trial) -> None:
    """L1, with a second adapter of another method, in either order."""
    if cell.unmergeable:
        return
    subject = Subject(cell)
    subject.add("two")
    for names in (("one", "two"), ("two", "one")):
        subject.activate(*names)
        expected = written(subject.exact())(exact_input(subject.x))
        assert_close(subject.model(subject.x), expected, cell.dtype, f"with {names}", size=subject.largest())


def fresh_adapter_changes_nothing(cell: Trial) -> None:
    """L2: at initialisation the output is the base model's, unless the config says otherwise."""
    subject = Subject(cell, fresh=True)
    base, fresh = subject.base_output(), subject.model(subject.x)
    if cell.fresh_changes:
        hold(not torch.equal(fresh, base), "a fresh adapter changes nothing, though its method says that it does")
    else:
        assert_close(fresh, base, cell.dtype, "output with a fresh adapter")


def same_seed_gives_the_same_adapter(cell: Trial) -> None:
    """L2: initial values depend on the seed alone."""
    first, second = (dict(Subject(cell, fresh=True).model.state_dict()) for _ in range(2))
    assert_bitwise(second, first)


def switched_off_it_is_the_base(cell: Trial) -> None:
    """L2: disabled, deactivated or switched off for a call, the adapter leaves no trace, bitwise."""
    subject = Subject(cell)

    def is_base() -> bool:
        expected, found = subject.bare_output(), subject.model(subject.x)
        if cell.renormalises:  # each lookup rounds the rows that it reads, and not every method looks up the base
            return torch.allclose(found, expected, rtol=16 * torch.finfo(cell.dtype).eps, atol=0.0)
        return torch.equal(found, expected)

    hold(not is_base(), "an adapter with random values changes nothing")
    with opened(subject.state, disabled=True):
        hold(is_base(), "switched off for a call, the output is not the base's")
    subject.activate()
    hold(is_base(), "with no adapter active, the output is not the base's")
    subject.activate("one")
    hold(not is_base(), "activated again, the adapter changes nothing")
    subject.state.enabled = False
    subject.state.touch()
    hold(is_base(), "disabled, the output is not the base's")


def without_padding(cell: Trial) -> Subject:
    """Return a subject whose batch has no padding tokens; torch cuts their gradients off wherever it meets them."""
    subject = Subject(cell)
    if cell.padding is not None:
        subject.x[subject.x == cell.padding] = 5
    return subject


def gradients_are_those_through_the_rewritten_weight(cell: Trial, names: tuple[str, ...] = ("one",)) -> None:
    """L8: gradients of ``forward`` are those of torch's own layer whose weights are functions of the adapter."""
    if cell.unmergeable:
        return
    subject = without_padding(cell)
    subject.add("two")
    subject.activate(*names)

    def through_weights(x: Tensor) -> Tensor:
        tensors: dict[str, Tensor] = {}
        for layer in subject.state.layers():
            stored = layer.kind.stored(layer.leaf_layer, layer.site, layer.fold(layer.chain()))
            tensors |= {f"{layer.site.owner}.{name}": tensor for name, tensor in stored.items()}
        y: Tensor = torch.func.functional_call(subject.untouched, tensors, (x,))
        return y

    found = outcome(subject.model, subject.x)
    expected = outcome(subject.model, subject.x, through_weights)
    assert_close(found.y, expected.y, cell.dtype, ulps=1000)
    # what the forward never reaches has no gradient, what the weight form reaches in vain has a zero one
    for name, gradient in expected.gradients.items():
        if name not in found.gradients:
            hold(not gradient.any(), f"{name} has no gradient")
            continue
        assert_close(found.gradients[name], gradient, cell.dtype, f"gradient of {name}", ulps=1000, size=1e-3)
    parameters = subject.model.named_parameters()
    trained = {name: p for name, p in parameters if p.requires_grad and not name.startswith("beside")}
    if any(record.method.samples for record in subject.state.records.values()):  # without noise, some are not read
        trained = {name: p for name, p in trained.items() if name in found.gradients}
    same_keys({k: g for k, g in found.gradients.items() if k != "x"}, trained, "tensors with a gradient")


def numeric_gradient(cell: Trial) -> None:
    """L8: the slope along one random direction of all adapter tensors, by finite differences."""
    if not cell.numeric:
        return
    subject = without_padding(cell)
    parameters = {n: p for n, p in subject.model.named_parameters() if p.requires_grad}
    found = outcome(subject.model, subject.x).gradients
    generator = torch.Generator().manual_seed(3)
    way = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    slope = sum(float((found[n] * way[n]).sum()) for n in way if n in found)
    step, values = 1e-6, []
    for sign in (1, -1):
        with torch.no_grad():
            for n, p in parameters.items():
                p.add_(sign * step * way[n])
            values.append(float(loss(subject.model(subject.x))))
            for n, p in parameters.items():
                p.sub_(sign * step * way[n])
    measured = (values[0] - values[1]) / (2 * step)
    hold(abs(measured) > 1e-3, "the output does not depend on the adapter's tensors")
    hold(abs(slope - measured) <= 1e-5 * max(1.0, abs(measured)), f"slope {slope:.6g}, measured {measured:.6g}")
