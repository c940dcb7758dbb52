"""Structured updates: their matrix against its definition, and every cheap form against the matrix."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay.core.inner  # enters the fast paths
import inlay.kinds  # noqa: F401  enters the kinds
from inlay.core.affine import Affine, Delta
from inlay.core.compressed import Compressed
from inlay.core.kind import kind_of
from inlay.core.output_rows import RowsOf
from inlay.core.structured import BlockLowRank, Circulant, Kron, Repeated, Sandwich, Sparse, Structured
from inlay.core.wavelets import Synthesiser, filters
from inlay.kernels.table import FAST, apply_delta

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(40, 80), (3, 5, 40)),
    "vector": (lambda: nn.Linear(40, 80), (40,)),
    "conv1d": (lambda: nn.Conv1d(20, 40, 2, stride=2, padding=1, padding_mode="reflect"), (3, 20, 9)),
    "conv2d": (lambda: nn.Conv2d(10, 20, (2, 3), padding=1, dilation=(1, 2)), (2, 10, 6, 7)),
    "conv2d_unbatched": (lambda: nn.Conv2d(10, 20, 1), (10, 6, 7)),
    "conv2d_grouped": (lambda: nn.Conv2d(20, 40, 2, groups=2), (2, 20, 6, 7)),
    "conv2d_depthwise": (lambda: nn.Conv2d(20, 20, 2, groups=20), (2, 20, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(10, 20, (1, 2, 1)), (2, 10, 3, 4, 2)),
    "embedding": (lambda: nn.Embedding(40, 20), (3, 7)),
    "embedding_padding": (lambda: nn.Embedding(40, 20, padding_idx=5), (3, 7)),
    "embedding_frequency": (lambda: nn.Embedding(40, 20, scale_grad_by_freq=True), (3, 7)),
}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def entries(count: int, out: int, fan_in: int) -> Sparse:
    places = torch.randperm(out * fan_in)[:count]
    return Sparse((places // fan_in).int(), (places % fan_in).int(), draw(count), out, fan_in)


def sandwich(out: int, fan_in: int) -> Sandwich:
    rows, columns = (Synthesiser(torch.tensor(filters("db3"), dtype=torch.float64), n) for n in (out, fan_in))
    return Sandwich(entries(30, rows.size, columns.size), rows, columns)


OPERATORS: dict[str, Callable[[int, int], Structured]] = {
    "kron": lambda out, fan_in: Kron(draw(4, 2), draw(out // 4, fan_in // 2)),
    "kron_wide": lambda out, fan_in: Kron(draw(2, fan_in // 2), draw(out // 2, 2)),
    "circulant_short": lambda out, fan_in: Circulant(draw(out // 4, fan_in // 4, 4)),
    "circulant": lambda out, fan_in: Circulant(draw(out // 20, fan_in // 20, 20)),
    "blocks": lambda out, fan_in: BlockLowRank(draw(2, fan_in // 2, 6), draw(2, 6, out // 2)),
    "repeated": lambda out, fan_in: Repeated(draw(out, 7), out, fan_in),
    "repeated_both": lambda out, fan_in: Repeated(draw(out // 4, 8), out, fan_in),
    "sparse_few": lambda out, fan_in: entries(20, out, fan_in),
    "sparse_many": lambda out, fan_in: entries(out * fan_in // 2, out, fan_in),
    "sandwich": sandwich,
}
UNFIT = [("circulant*", "conv2d_unbatched"), ("circulant", "conv2d_depthwise")]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("layer", LAYERS)
def test_cheap_forms_equal_the_matrix(name: str, layer: str) -> None:
    """Outputs, and gradients of the input and of every factor, in double precision."""
    torch.manual_seed(0)
    build, shape = LAYERS[layer]
    module = build().double()
    kind = kind_of(module)
    assert kind is not None
    site = kind.site("layer", module)
    if any(fnmatchcase(name, one) and layer == other for one, other in UNFIT):
        pytest.skip("the shapes do not divide")
    delta = OPERATORS[name](site.out, site.fan_in)
    delta.scale = 0.7
    x = torch.randint(40, shape) if site.lookup else torch.randn(shape, dtype=torch.float64)
    if site.lookup:
        x[0, :3] = torch.tensor([5, 5, 39])

    def run(cheap: bool) -> list[Tensor]:
        leaves = [getattr(delta, factor).detach().clone().requires_grad_() for factor in delta.factors]
        for factor, leaf in zip(delta.factors, leaves, strict=True):
            setattr(delta, factor, leaf)
        features = x.clone().requires_grad_() if x.is_floating_point() else x
        if cheap:
            y = apply_delta(kind, module, site, features, delta, "base")
        else:
            y = kind.run(module, site, Affine(delta.dense()), features, (), {})
        (y * torch.linspace(-1, 2, y.numel()).cos().view(y.shape)).sum().backward()
        return [y.detach(), *(leaf.grad for leaf in leaves), *([features.grad] if features is not x else [])]

    for found, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_matrices_are_what_they_are_called() -> None:
    torch.manual_seed(0)
    left, right = draw(3, 2), draw(4, 5)
    assert torch.equal(Kron(left, right).dense(), torch.kron(left, right))
    kernel = draw(2, 3, 5)
    found = Circulant(kernel).dense()
    for row in range(10):
        for column in range(15):
            assert found[row, column] == kernel[row // 5, column // 5, (column - row) % 5]
    A, B = draw(2, 5, 4), draw(2, 4, 3)
    found = BlockLowRank(A, B).dense()
    for j in range(2):
        for n in range(2):
            block = B[j, 2 * n : 2 * n + 2].T @ A[n, :, 2 * j : 2 * j + 2].T
            torch.testing.assert_close(found[3 * j : 3 * j + 3, 5 * n : 5 * n + 5], block)
    tile = draw(2, 3)
    found = Repeated(tile, 4, 7).dense()
    assert all(found[i, j] == tile[i % 2, j % 3] for i in range(4) for j in range(7))
    some = entries(9, 4, 6)
    expected = torch.zeros(4, 6, dtype=torch.float64)
    expected[some.rows.long(), some.columns.long()] = some.values
    assert torch.equal(some.dense(), expected)


def test_half_precision_rounds_no_circulant_kernel() -> None:
    """Fourier transforms run in single precision, so the kernel stays there too."""
    kernel = torch.randn(2, 3, 16)
    assert Circulant(kernel).to(torch.bfloat16).dtype == torch.float32
    assert Kron(kernel[0], kernel[1]).to(torch.bfloat16).dtype == torch.bfloat16


class Largest(torch.overrides.TorchFunctionMode):
    """Notes the most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> object:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage().nbytes() >= made.numel():
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("name", ["kron", "circulant", "blocks", "repeated", "sparse_few", "sandwich"])
@pytest.mark.parametrize("lookup", [False, True])
def test_no_matrix_is_made(name: str, lookup: bool) -> None:
    """For a few inputs nothing as large as the layer's weight is made, whatever the operator."""
    if name == "sandwich" and lookup:
        pytest.skip("a row of the update asks for the whole")
    module = nn.Embedding(400, 400) if lookup else nn.Linear(400, 400, bias=False)
    kind = kind_of(module)
    assert kind is not None
    site = kind.site("layer", module)
    delta: Delta = OPERATORS[name](400, 400)
    if name == "circulant":
        delta = Circulant(draw(10, 10, 40))
    if name == "blocks":
        delta = BlockLowRank(draw(2, 200, 6), draw(2, 6, 200))
    with Largest() as largest:
        apply_delta(kind, module, site, torch.randint(400, (3,)) if lookup else draw(3, 400), delta, "base")
    assert 0 < largest.numbers < 400 * 400 / 2


def test_every_operator_has_a_cheap_form_here() -> None:
    operators = {type(make(20, 40)) for make in OPERATORS.values() if make is not OPERATORS["circulant"]}
    found = {operator for _, operator in FAST if issubclass(operator, Structured)}
    # one has another gradient than its matrix (tests/against_peft), one is some rows of any other (core/test_slices)
    assert found - {Compressed, RowsOf} == operators
