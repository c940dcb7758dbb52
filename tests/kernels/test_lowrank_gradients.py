"""The two autograd functions of low-rank layers against their formulas and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lowrank_models import batch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from inlay.errors import UnsupportedError
from inlay.kernels.lowrank import expand, shrink
from inlay.kernels.masks import Mask

SHAPES = [(4, 5), (2, 3, 5), (5,), (1, 5), (0, 5)]
IN, OUT = 5, 4
F64 = torch.float64


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64).requires_grad_()


def groups() -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [[leaf(3, IN)], [leaf(2, IN), leaf(1, IN)]]


def masked(x: Tensor, kind: str) -> Mask | None:
    return None if kind == "no mask" else Mask(x, 0.5, again=kind == "drawn again")


@pytest.mark.parametrize("kind", ["no mask", "kept", "drawn again"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shrink(shape: tuple[int, ...], kind: str) -> None:
    (A,), (B, C) = held = groups()
    x = batch(*shape).requires_grad_()
    mask = masked(x, kind)
    dropped = x if mask is None else x * mask.bits()
    expected = [dropped @ A.mT, dropped @ torch.cat([B, C]).mT]
    for found, wanted in zip(shrink(x, held, F64, mask), expected, strict=True):
        torch.testing.assert_close(found, wanted)

    def function(x: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
        return tuple(shrink(x, [[A], [B, C]], F64, mask))

    assert gradcheck(function, (x, A, B, C), fast_mode=x.dim() > 2)
    assert gradgradcheck(function, (x, A, B, C), fast_mode=True)


def test_shrink_where_only_one_of_the_layers_has_a_gradient() -> None:
    (A,), (B, C) = groups()
    x = batch(4, IN).requires_grad_()
    first, _ = shrink(x, [[A], [B, C]], F64)
    found = torch.autograd.grad(first.sin().sum(), (x, A, B, C), allow_unused=True)
    expected = torch.autograd.grad((x @ A.mT).sin().sum(), (x, A))
    assert found[2] is None
    assert found[3] is None
    torch.testing.assert_close(found[:2], expected)


def test_shrink_keeps_no_input_for_frozen_factors() -> None:
    held = [[A.detach() for A in group] for group in groups()]
    x = batch(4, IN).requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):  # type: ignore[func-returns-value]
        first, second = shrink(x, held, F64)
    assert kept
    assert x.data_ptr() not in kept
    (found,) = torch.autograd.grad(first.sin().sum() + second.sum(), x)
    (expected,) = torch.autograd.grad((x @ held[0][0].mT).sin().sum() + (x @ torch.cat(held[1]).mT).sum(), x)
    torch.testing.assert_close(found, expected)


def problem(shape: tuple[int, ...], base: str, gained: bool) -> dict[str, Any]:
    """Inputs of ``expand``: two products down, of one and of two updates, with different ranks and scales."""
    torch.manual_seed(2)
    lead = shape[:-1]
    inputs: dict[str, Any] = {
        "t": leaf(*lead, 3),
        "u": leaf(*lead, 3),
        "B": leaf(OUT, 3),
        "C": leaf(OUT, 2),
        "D": leaf(OUT, 1),
    }
    if base == "given":
        inputs["given"] = leaf(*lead, OUT)
    else:
        inputs["x"] = batch(*shape).requires_grad_()
        if base == "product with bias":
            inputs["own"] = leaf(OUT)
    if gained:
        inputs |= {"gain": leaf(OUT), "bias": leaf(OUT)}
    return inputs


def apply(weight: Tensor, scales: list[list[float]], **held: Tensor) -> Tensor:
    base = held["given"] if "given" in held else (held["x"], weight, held.get("own"))
    factors = [[held["B"]], [held["C"], held["D"]]]
    return expand(base, [held["t"], held["u"]], factors, scales, held.get("gain"), held.get("bias"))


def formula(weight: Tensor, scales: list[list[float]], **held: Tensor) -> Tensor:
    y = held["given"] if "given" in held else held["x"] @ weight.mT
    y = y + held.get("own", torch.zeros(OUT, dtype=F64)) + scales[0][0] * held["t"] @ held["B"].mT
    for (start, stop), factor, scale in zip([(0, 2), (2, 3)], (held["C"], held["D"]), scales[1], strict=True):
        y = y + scale * held["u"][..., start:stop] @ factor.mT
    return y * held["gain"] + held["bias"] if "gain" in held else y


@pytest.mark.parametrize("scales", [[[2.0], [0.5, -3.0]], [[1.0], [0.7, 0.7]]], ids=["scales", "equal scales"])
@pytest.mark.parametrize("gained", [False, True], ids=["no gain", "gain"])
@pytest.mark.parametrize("base", ["product", "product with bias", "given"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expand(shape: tuple[int, ...], base: str, gained: bool, scales: list[list[float]]) -> None:
    weight = batch(OUT, IN)
    if gained and base == "product with bias":
        base = "product"  # what is scaled comes without its bias
    inputs = problem(shape, base, gained)
    names, tensors = tuple(inputs), tuple(inputs.values())
    torch.testing.assert_close(apply(weight, scales, **inputs), formula(weight, scales, **inputs))
    with torch.no_grad():
        torch.testing.assert_close(apply(weight, scales, **inputs), formula(weight, scales, **inputs))

    def function(*tensors: Tensor) -> Tensor:
        return apply(weight, scales, **dict(zip(names, tensors, strict=True)))

    assert gradcheck(function, tensors, fast_mode=len(shape) > 2)
    if not gained:
        assert gradgradcheck(function, tensors, fast_mode=True)


def test_expand_leaves_a_given_output_as_it_is() -> None:
    inputs = problem((4, IN), "given", False)
    before = inputs["given"].detach().clone()
    apply(batch(OUT, IN), [[2.0], [0.5, -3.0]], **inputs)
    assert torch.equal(inputs["given"], before)


@pytest.mark.parametrize("alone", ["given", "t", "B", "D", "gain", "bias"])
def test_expand_where_only_one_input_wants_a_gradient(alone: str) -> None:
    weight, scales = batch(OUT, IN), [[2.0], [0.5, -3.0]]
    inputs = problem((4, IN), "given", True)
    inputs = {name: tensor.detach().requires_grad_(name == alone) for name, tensor in inputs.items()}
    found = torch.autograd.grad(apply(weight, scales, **inputs).sin().sum(), inputs[alone])
    expected = torch.autograd.grad(formula(weight, scales, **inputs).sin().sum(), inputs[alone])
    torch.testing.assert_close(found, expected)


def test_gradients_of_gradients_are_refused_with_a_gain() -> None:
    inputs = problem((4, IN), "product", True)
    y = apply(batch(OUT, IN), [[2.0], [0.5, -3.0]], **inputs)
    with pytest.raises(UnsupportedError, match=r"gradients of gradients.*without_fast_paths"):
        torch.autograd.grad(y.sin().sum(), inputs["x"], create_graph=True)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
def test_products_of_a_higher_precision_are_rounded_once(low: torch.dtype) -> None:
    """Half-precision base and fp32 products: the sum is that of fp32, rounded to the base's dtype."""
    torch.manual_seed(2)
    given, t, B = torch.randn(6, OUT).to(low), torch.randn(6, 3), torch.randn(OUT, 3)
    found = expand(given, [t], [[B]], [[0.7]])
    assert found.dtype == low
    assert torch.equal(found, torch.addmm(given.float(), t, B.mT, alpha=0.7).to(low))
