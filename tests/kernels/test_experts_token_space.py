"""Expert banks in token space, beside the same module with rewritten parameters and beside what its class does."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from expert_banks import CLASSES, EXPERTS, IN, INNER, adapted, by_hand, experts, nested, routed, with_gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from inlay.core.nest import why_generic
from inlay.kernels.experts_product import bank_product
from inlay.kernels.experts_route import Route
from inlay.kernels.switch import without_fast_paths


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        scale = max(want.abs().max().item(), 1e-30) if want.numel() else 1.0
        torch.testing.assert_close(
            found[name] / scale, want / scale, rtol=0, atol=tolerance, msg=lambda m, n=name: n + m
        )


def both_ways(layer: nn.Module, inputs: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    assert [why_generic(one) for one in nested(layer)] == [None] * len(nested(layer))
    fast = with_gradients(layer, inputs)
    with without_fast_paths():
        return fast, with_gradients(layer, inputs)


@pytest.mark.parametrize("name", CLASSES)
def test_equals_rewritten_parameters_and_the_class_itself(name: str) -> None:
    layer, _ = adapted(experts(name))
    fast, slow = both_ways(layer, routed())
    assert_same(fast, slow)
    torch.testing.assert_close(fast["output"], by_hand(layer)(*routed()))
    base = layer.get_base_layer()(*routed())
    assert (fast["output"] - base).abs().max() > 1e-3 * base.abs().max()


def test_experts_that_come_sorted() -> None:
    """Llama 4 stores (experts, in, out) and does not say so, so its adapters read the banks the other way round."""
    layer, _ = adapted(experts("Llama4TextExperts"))
    fast, slow = both_ways(layer, routed(tokens=EXPERTS * 4)[:1])
    assert_same(fast, slow)
    assert_same(*both_ways(layer, routed(tokens=EXPERTS)[:1]))


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
def test_other_implementations_of_the_same_module(name: str, way: str) -> None:
    layer, _ = adapted(experts(name, way, torch.float32), ranks=(4,))
    fast, slow = both_ways(layer, routed(dtype=torch.float32))
    assert_same(fast, slow, 1e-5)


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float64(name: str, dtype: torch.dtype) -> None:
    """Beside rewritten parameters whose adapters have the half precision, in which products run here."""
    layer, _ = adapted(experts(name, dtype=dtype), ranks=(4, 2))
    half, exact = (copy.deepcopy(layer).to(d) for d in (dtype, torch.float64))
    exact.load_state_dict(half.state_dict())
    layer.load_state_dict(half.state_dict())
    assert {p.dtype for p in layer.parameters()} == {dtype, torch.float32}
    inputs = routed(dtype=dtype)
    fast = with_gradients(layer, inputs)
    with without_fast_paths():
        slow = with_gradients(half, inputs)
    as_double = (t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs)
    squares = [0.0, 0.0]
    for key, want in with_gradients(exact, tuple(as_double)).items():
        errors = [((found[key].double() - want).norm() / want.norm()).item() for found in (fast, slow)]
        assert errors[0] <= 1.5 * errors[1], (key, errors)
        squares = [one + error**2 for one, error in zip(squares, errors, strict=True)]
    assert squares[0] <= squares[1], squares


@pytest.mark.parametrize(
    ("tokens", "chosen", "among"),
    [(1, 1, 5), (1, 3, 5), (40, 1, 1), (33, 5, 5), (3, 2, 6)],
    ids=["one", "one token", "one expert", "all but one", "few"],
)
def test_sizes(tokens: int, chosen: int, among: int) -> None:
    layer, _ = adapted(experts("GptOssExperts"), ranks=(1, 3))
    assert_same(*both_ways(layer, routed(tokens, chosen, among=among)))


def test_no_tokens() -> None:
    layer, _ = adapted(experts("GptOssExperts"))
    found = with_gradients(layer, routed(tokens=0))
    assert found["output"].shape == (0, IN)
    assert not any(gradient.any() for gradient in found.values())


def test_inputs_that_are_views() -> None:
    layer, _ = adapted(experts("MixtralExperts"))
    x, index, weights = routed()
    wide = torch.cat([x.detach(), x.detach()], 1).mT.contiguous().mT.requires_grad_()
    given = (wide[:, ::2], index.mT.contiguous().mT, weights.expand(24, 3))
    want = by_hand(layer)(*given)
    torch.testing.assert_close(layer(*given), want)
    first, second = (torch.autograd.grad(y.sum(), wide)[0] for y in (layer(*given), want))  # an expanded gradient
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj"], ["down_proj", "gate_up_proj_bias"]])
def test_single_projections_and_a_bias_beside(targets: list[str]) -> None:
    layer, _ = adapted(experts("GptOssExperts"), targets=targets)
    fast = with_gradients(layer, routed())
    with without_fast_paths():
        assert_same(fast, with_gradients(layer, routed()))
    reasons = {one.parameter_name: why_generic(one) for one in nested(layer)}
    assert reasons.pop("gate_up_proj_bias", "is no bank of experts").endswith("is no bank of experts")
    assert set(reasons.values()) == {None}


def test_ranks_by_bank() -> None:
    layer, _ = adapted(experts("MixtralExperts"), ranks=(2,), rank_pattern={"down_proj": 5}, use_rslora=True)
    assert [one.r["a"] for one in nested(layer)] == [5, 2]
    assert_same(*both_ways(layer, routed()))


def test_a_smaller_rank_of_an_expert_stays_smaller() -> None:
    """Ranks by expert are zeros in A and B, as adapters of single experts come when they are stacked."""
    layer, _ = adapted(experts("MixtralExperts"), ranks=(3,))
    with torch.no_grad():
        for one in nested(layer):
            one.lora_A["a"].weight.view(EXPERTS, 3, -1)[2, 1:] = 0
            one.lora_B["a"].weight.view(-1, 3, EXPERTS)[:, 1:, 2] = 0
    found = with_gradients(layer, routed())
    for name, gradient in found.items():
        if "lora_A" in name:
            assert not gradient.view(EXPERTS, 3, -1)[2, 1:].any()
            assert gradient.view(EXPERTS, 3, -1)[2, 0].any()
        if "lora_B" in name:
            assert not gradient.view(-1, 3, EXPERTS)[:, 1:, 2].any()


# -- the product itself ----------------------------------------------------------------------------------------------


def factors(spread: bool) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(4 if spread else 8, 3), (5, 3, 4), (5, 2, 3), (5, 2, 4), (4 if spread else 8, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("spread", [True, False])
@pytest.mark.parametrize("what", ["plain", "dropout", "no update", "no bank"])
@pytest.mark.parametrize("few", [True, False])
def test_gradients_and_their_gradients(spread: bool, what: str, few: bool) -> None:
    x, weight, A, B, dropped = factors(spread)
    weight = weight.detach().mT.contiguous().mT
    route = Route(torch.tensor([[3, 1], [1, 3], [3, 1], [1, 3]] if few else [[3, 1], [0, 3], [4, 0], [1, 3]]), 5)
    if few:
        A, B = (t.detach()[:2].clone().requires_grad_() for t in (A, B))
        assert route.segments.few

    def product(*given: Tensor) -> Tensor:
        if what == "no update":
            return bank_product(given[0], weight, None, None, route, spread)
        bank = None if what == "no bank" else weight
        return bank_product(given[0], bank, given[1], given[2], route, spread, *given[3:])

    given = (x,) if what == "no update" else (x, A, B, dropped) if what == "dropout" else (x, A, B)
    assert torch.autograd.gradcheck(product, given)
    assert torch.autograd.gradgradcheck(product, given, fast_mode=True)


def test_rows_of_no_expert_give_zeros() -> None:
    x, weight, A, B, _ = factors(True)
    index = torch.tensor([[5, 1], [0, 5], [5, 5], [1, 3]])
    y = bank_product(x, weight.detach(), A, B, Route(index, 5), True)
    assert not y[-4:].any()
    assert y[:-4].any(1).all()
    assert torch.autograd.gradcheck(
        lambda *t: bank_product(t[0], weight.detach(), *t[1:], Route(index, 5), True), (x, A, B)
    )


# -- bytes -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest storage that an operator makes, those of parameters apart."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in module.parameters()}
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return result


def largest(layer: nn.Module, inputs: Any) -> int:
    with Largest(layer) as seen:
        with_gradients(layer, inputs)
    return seen.elements


@pytest.mark.parametrize("name", ["MixtralExperts", "GptOssExperts"])
@pytest.mark.parametrize("way", ["eager", "grouped_mm"])
def test_nothing_as_large_as_a_bank_is_made(name: str, way: str) -> None:
    layer, _ = adapted(experts(name, way, torch.float32), ranks=(2, 1))
    inputs = routed(tokens=8, chosen=3, dtype=torch.float32)
    bank = EXPERTS * IN * INNER  # the smaller of the two
    rows = 8 * 3 * 2 * INNER
    assert rows < bank
    assert largest(layer, inputs) < bank
    with without_fast_paths():
        assert largest(layer, inputs) >= bank


def test_backward_keeps_tokens_and_not_rows() -> None:
    """Each input of a bank is kept once, the tokens as they are before they are spread over their experts."""
    layer, _ = adapted(experts("MixtralExperts", dtype=torch.float32), ranks=(2,), targets=["gate_up_proj"])
    x, index, weights = routed(tokens=30, chosen=5, dtype=torch.float32)
    kept: dict[int, tuple[int, ...]] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, index, weights)
    assert x.untyped_storage().data_ptr() in kept
    assert (150, IN) not in kept.values()
    assert (150, 2) in kept.values()  # the rank-wide product


def test_dropout_by_hand() -> None:
    """Tokens lose elements before they go to their experts, rows before the second bank; for the update alone."""
    from inlay.kernels.masks import Mask

    p = 0.25
    layer, _ = adapted(experts("MixtralExperts"), ranks=(2,), lora_dropout=p)
    x, index, weights = routed()
    layer.train()
    torch.manual_seed(5)
    found = with_gradients(layer, (x, index, weights))
    torch.manual_seed(5)
    down, up = nested(layer)
    base = layer.get_base_layer()

    def masked(tensor: Tensor) -> Tensor:
        mask = Mask(tensor, p, again=False)
        return tensor * mask.bits() * mask.scale

    def by_experts(one: Any, rows: Tensor, read: Tensor, which: Tensor) -> Tensor:
        A, B = one.lora_A["a"].weight.view(EXPERTS, 2, -1), one.lora_B["a"].weight.view(-1, 2, EXPERTS)
        weight = getattr(base, one.parameter_name)
        parts = [
            weight[e] @ row + one.scaling["a"] * B[:, :, e] @ A[e] @ r
            for row, r, e in zip(rows, read, which, strict=True)
        ]
        return torch.stack(parts)

    route = Route(index, EXPERTS)
    rows = by_experts(up, x[route.tokens], masked(x)[route.tokens], route.experts)
    hidden = base._apply_gate(rows) * weights.reshape(-1)[route.order, None]
    rows = by_experts(down, hidden, masked(hidden), route.experts)
    want = torch.zeros_like(x).index_add(0, route.tokens, rows)
    torch.testing.assert_close(found["output"], want)
    cotangent = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    trained = [q for q in layer.parameters() if q.requires_grad]
    for name, expected in zip(
        [n for n, q in layer.named_parameters() if q.requires_grad] + ["input 0", "input 2"],
        torch.autograd.grad(want, [*trained, x, weights], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(found[name], expected)
    layer.eval()
    assert_same(*both_ways(layer, (x, index, weights)))


def test_each_adapter_has_a_dropout_of_its_own() -> None:
    layer, _ = adapted(experts("MixtralExperts"), lora_dropout=0.5)
    x, index, weights = routed(tokens=2000, chosen=2)
    layer.eval()
    want = layer(x, index, weights)
    base = layer.get_base_layer()(x, index, weights)
    layer.train()
    # not linear in the first update, so only near on average
    mean = torch.stack([layer(x, index, weights).detach() for _ in range(8)]).mean(0)
    share = (mean - base).flatten() @ (want - base).flatten() / (want - base).norm() ** 2
    assert math.isclose(share.item(), 1.0, abs_tol=0.15)
    assert (mean - want).norm() < 0.8 * (layer(x, index, weights) - want).norm()
