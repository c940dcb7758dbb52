"""A linear layer with its low-rank updates as one step, against its formula and against finite differences."""

from __future__ import annotations

import pytest
import torch
from lowrank_models import batch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from inlay.errors import UnsupportedError
from inlay.kernels.lowrank_linear import low_rank_linear
from inlay.kernels.masks import Mask

SHAPES = [(4, 5), (2, 3, 5), (5,), (1, 5), (0, 5)]
IN, OUT = 5, 4
F64 = torch.float64
SCALES = [[2.0, -0.5], [0.7, 0.7], [1.0, 1.0]]


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64).requires_grad_()


def problem(shape: tuple[int, ...], more: str) -> dict[str, Tensor]:
    torch.manual_seed(3)
    inputs = {"x": batch(*shape).requires_grad_(), "A": leaf(3, IN), "C": leaf(2, IN)}
    inputs |= {"B": leaf(OUT, 3), "D": leaf(OUT, 2)}
    if more == "bias":
        inputs["own"] = leaf(OUT)
    if more == "gain":
        inputs |= {"gain": leaf(OUT), "last": leaf(OUT)}
    return inputs


def run(weight: Tensor, scales: list[float], mask: Mask | None, **held: Tensor) -> Tensor:
    base = held["x"], weight, held.get("own")
    return low_rank_linear(
        base, [held["A"], held["C"]], [held["B"], held["D"]], scales, mask, held.get("gain"), held.get("last")
    )


def formula(weight: Tensor, scales: list[float], mask: Mask | None, **held: Tensor) -> Tensor:
    x = held["x"]
    dropped = x if mask is None else x * mask.bits()
    y = x @ weight.mT + held.get("own", torch.zeros(OUT, dtype=F64))
    for A, B, scale in zip("AC", "BD", scales, strict=True):
        y = y + scale * (dropped @ held[A].mT) @ held[B].mT
    return y * held["gain"] + held["last"] if "gain" in held else y


@pytest.mark.parametrize("scales", SCALES, ids=str)
@pytest.mark.parametrize("kind", ["no mask", "kept", "drawn again"])
@pytest.mark.parametrize("more", ["plain", "bias", "gain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], more: str, kind: str, scales: list[float]) -> None:
    weight = batch(OUT, IN)
    inputs = problem(shape, more)
    mask = None if kind == "no mask" else Mask(inputs["x"], 0.5, again=kind == "drawn again")
    names, tensors = tuple(inputs), tuple(inputs.values())
    torch.testing.assert_close(run(weight, scales, mask, **inputs), formula(weight, scales, mask, **inputs))
    with torch.no_grad():
        torch.testing.assert_close(run(weight, scales, mask, **inputs), formula(weight, scales, mask, **inputs))

    def function(*tensors: Tensor) -> Tensor:
        return run(weight, scales, mask, **dict(zip(names, tensors, strict=True)))

    assert gradcheck(function, tensors, fast_mode=len(shape) > 2)
    if more != "gain":
        assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("trains", [("A",), ("B", "C"), ("x",), ("x", "D"), ("gain",), ("last", "A")], ids=str)
def test_only_what_trains_gets_a_gradient(trains: tuple[str, ...]) -> None:
    weight = batch(OUT, IN)
    inputs = problem((4, IN), "gain")
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in trains)
    run(weight, SCALES[0], None, **inputs).sin().sum().backward()
    wanted = torch.autograd.grad(formula(weight, SCALES[0], None, **inputs).sin().sum(), [inputs[n] for n in trains])
    for name, gradient in zip(trains, wanted, strict=True):
        torch.testing.assert_close(inputs[name].grad, gradient)
    assert all(tensor.grad is None for name, tensor in inputs.items() if name not in trains)


STRIDED = {
    "turned": lambda: batch(IN, 4).mT,
    "every second": lambda: batch(4, 2 * IN)[:, ::2],
    "expanded": lambda: batch(1, IN).expand(4, IN),
}


@pytest.mark.parametrize("x", [make() for make in STRIDED.values()], ids=list(STRIDED))
def test_inputs_and_gradients_of_any_strides(x: Tensor) -> None:
    inputs = problem((4, IN), "bias") | {"x": x.detach().requires_grad_()}
    weight = batch(OUT, IN)
    names = tuple(inputs)
    turned = batch(OUT, len(x))
    for reduce in (torch.sum, lambda y: (y.mT * turned).sum()):  # a gradient that is one number, and one that is turned
        found = torch.autograd.grad(reduce(run(weight, SCALES[0], None, **inputs)), list(inputs.values()))
        wanted = torch.autograd.grad(reduce(formula(weight, SCALES[0], None, **inputs)), list(inputs.values()))
        for name, one, other in zip(names, found, wanted, strict=True):
            torch.testing.assert_close(one, other, msg=name)


def test_the_input_is_kept_once_and_nothing_as_wide_as_the_output() -> None:
    inputs = problem((64, IN), "bias")
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(batch(OUT, IN), SCALES[0], None, **inputs)
    wide = [tensor.shape for tensor in kept if tensor.shape[0] == 64]
    assert sorted(map(tuple, wide)) == [(64, 5), (64, 5)]  # x, and t with its 3 + 2 ranks
    assert sum(tensor.data_ptr() == inputs["x"].data_ptr() for tensor in kept) == 1


def test_gradients_of_gradients_of_scaled_rows_are_refused() -> None:
    inputs = problem((4, IN), "gain")
    y = run(batch(OUT, IN), SCALES[0], None, **inputs)
    with pytest.raises(UnsupportedError, match="without_fast_paths"):
        torch.autograd.grad(y.sum(), inputs["x"], create_graph=True)
