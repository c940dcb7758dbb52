"""Many adapters in one batch: every sample gets what its own adapter gives it alone, in one base product for all."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from mixed_batches import MIXED, OUT, RANKS, TOLERANCE, alone, assert_equal, batch, run, subject
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import inlay.core.mixed as mixed
import inlay.core.routes as routes
from inlay.core.call import opened
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.state import BASE
from inlay.kernels.grouped import Updates, add_updates
from inlay.kernels.slices import Slices, make_slices
from inlay.methods.lora import LoraConfig
from inlay.methods.vera import VeraConfig


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that took the path of this test file."""
    seen: list[str] = []
    whole = mixed._run_together

    def spy(layer: Any, *args: Any) -> Tensor | None:
        y = whole(layer, *args)
        if y is not None:
            seen.append(layer.site.name)
        return y

    monkeypatch.setattr(mixed, "_run_together", spy)
    return seen


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("inner", [(), (1,), (5,), (2, 3), (400,)], ids=str)
def test_each_sample_as_if_alone(dtype: torch.dtype, inner: tuple[int, ...], taken: list[str]) -> None:
    """Short samples are sorted, long ones are left where they are."""
    model, state = subject(dtype)
    x = batch(dtype, *inner)
    found = run(model, state, x)
    assert taken == ["first", "last"]
    assert_equal(found, run(model, state, x, around=alone), TOLERANCE[dtype])


@pytest.mark.parametrize(
    "names",
    [("a", "b"), ("b", BASE), ("a", "a", "b", "b"), ("a", "b", "a", "b"), (BASE, "elsewhere", "a"), (BASE, "a") * 20],
    ids=lambda names: "-".join(names[:4]),
)
def test_arrangements(names: tuple[str, ...], taken: list[str]) -> None:
    model, state = subject()
    for inner in ((), (3,), (500,)):
        x = batch(torch.float64, *inner, samples=len(names))
        assert_equal(run(model, state, x, names), run(model, state, x, names, alone), 1e-12)
    assert "last" in taken


def test_no_tokens_at_all(taken: list[str]) -> None:
    model, state = subject()
    x = batch(torch.float64, 0)
    found = run(model, state, x)
    assert taken == ["first", "last"]
    assert found["y"] is not None
    assert found["y"].shape == (len(MIXED), 0, OUT)
    assert found["x"] is not None
    assert found["x"].shape == x.shape


def test_inputs_in_any_layout(taken: list[str]) -> None:
    model, state = subject()
    x = batch(torch.float64, 6, samples=6)
    for view in (lambda t: t.transpose(0, 1), lambda t: t[:, ::2], lambda t: t[:, :1].expand(-1, 4, -1)):
        outcomes = [
            run(model, state, x, MIXED[:6], around, lambda t, view=view: model(view(t)))
            for around in (nullcontext, alone)
        ]
        assert_equal(*outcomes, 1e-12)
    assert len(taken) == 6


def test_an_expanded_gradient(taken: list[str]) -> None:
    model, state = subject()
    for inner in ((), (300,)):
        x = batch(torch.float64, *inner)
        grads = []
        for around in (nullcontext, alone):
            with opened(state, names=MIXED), around():
                grads.append(torch.autograd.grad(model(x).sum(), x)[0])
        torch.testing.assert_close(*grads)


def test_gradcheck_and_gradients_of_gradients() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    A, B, biases = [random(1, 3), random(2, 3)], [random(2, 1), random(2, 2)], [random(2), None]
    weight = random(2, 3).detach()
    updates = [0, 1, -1, 0]
    for width in (0, 10**6):  # sorted, and not
        slices = make_slices(updates, width, torch.device("cpu"))
        assert (slices.order is None) == (width > 0)

        def function(x: Tensor, y: Tensor | None, *tensors: Tensor, slices: Slices = slices) -> Tensor:
            base = (x, weight, None) if y is None else y
            bias = [tensors[4], None]
            made = Updates(tensors[:2], tensors[2:4], bias, [0.5, 2.0], [0.0, 0.0], torch.float64)
            return add_updates(base, x, slices, made)

        x = random(4, 1, 3)
        for y in (None, random(4, 1, 2)):
            inputs = (x, y, *A, *B, biases[0])
            assert torch.autograd.gradcheck(function, inputs)
            assert torch.autograd.gradgradcheck(function, inputs)


def test_biases_of_the_update(taken: list[str]) -> None:
    model, state = subject(lora_bias=True)
    for layer in (model.first, model.last):
        for name, parameter in layer.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                nn.init.uniform_(parameter)
    for inner in ((), (300,)):
        x = batch(torch.float64, *inner)
        assert_equal(run(model, state, x), run(model, state, x, around=alone), 1e-12)
    assert "first" in taken


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_in_the_dtype_of_the_adapter(dtype: torch.dtype, taken: list[str]) -> None:
    model, state = subject(dtype, policy=PEFT)
    x = batch(dtype, 3)
    assert_equal(run(model, state, x), run(model, state, x, around=alone), TOLERANCE[dtype])
    assert taken == ["first", "last"]


def test_autocast(taken: list[str]) -> None:
    model, state = subject(torch.float32)
    x = batch(torch.float32, 3)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    found = run(model, state, x, forward=forward)
    assert taken == ["first", "last"]
    assert_equal(found, run(model, state, x, around=alone, forward=forward), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_with_the_same_rows(reentrant: bool, taken: list[str]) -> None:
    model, state = subject()
    model.train()
    x = batch(torch.float64, 3)
    expected = run(model, state, x)
    found = run(model, state, x, forward=lambda x: checkpoint(model, x, use_reentrant=reentrant))
    assert_equal(found, expected, 1e-12)
    assert len(taken) >= 5  # the last layer may stop as soon as it has what backward needs


def test_dropout_is_each_adapters_own(taken: list[str]) -> None:
    """Rows of an adapter without dropout are as in evaluation; the mean over many masks is the output without any."""
    for policy in (None, PEFT):
        taken.clear()
        model, state = subject(torch.float64, policy)
        layer: Any = model.first
        layer.lora_dropout["a"] = nn.Dropout(0.5)
        model.train()
        x = batch(torch.float64, 3)
        with torch.no_grad(), opened(state, names=MIXED):
            runs = torch.stack([layer(x) for _ in range(400)])
            model.eval()
            expected = layer(x)
        dropping = [name == "a" for name in MIXED]
        for row, drops in enumerate(dropping):
            error = (runs[:, row] - expected[row]).abs()
            if drops:
                assert error.max() > 0.1
                mean = (runs[:, row].mean(0) - expected[row]).abs()
                assert bool((mean < 5 * runs[:, row].std(0) / 20 + 1e-9).all())
            else:
                assert error.max() < 1e-12
        assert taken


def test_gradients_go_through_the_mask_of_the_forward(taken: list[str]) -> None:
    """With the layer linear in x, x's gradient times x is the update itself."""
    model, state = subject()
    layer: Any = model.first
    for name in RANKS:
        layer.lora_dropout[name] = nn.Dropout(0.5)
    layer.base_layer.bias = None
    model.train()
    for inner in ((), (300,)):
        x = batch(torch.float64, *inner)
        with opened(state, names=MIXED):
            y = layer(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        torch.testing.assert_close((grad * x).sum(-1), y.sum(-1))
    assert taken == ["first", "first"]


def test_other_methods_beside_low_rank_ones(taken: list[str]) -> None:
    """VeRA's update has low rank too; DoRA's layers go the generic way."""
    model, state = subject()
    inject(plan(model, VeraConfig(r=3, target_modules=["last"], init_weights=False), "v"), seed=9)
    inject(plan(model, LoraConfig(r=2, use_dora=True, target_modules=["first"], init_lora_weights=False), "d"), seed=9)
    x = batch(torch.float64, 3, samples=4)
    names = ("a", "v", "d", "b")
    assert_equal(run(model, state, x, names), run(model, state, x, names, alone), 1e-12)
    assert taken == ["last"]


class Products(TorchDispatchMode):
    """Counts products with one weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.pointer = weight.data_ptr()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::linear", "aten::matmul"):
            held = [arg for arg in args if isinstance(arg, Tensor)]
            self.count += any(tensor.data_ptr() == self.pointer for tensor in held)
        return func(*args, **(kwargs or {}))


def test_one_base_product_for_the_whole_batch() -> None:
    model, state = subject()
    for layer in (model.first, model.last):
        x = torch.randn(len(MIXED), 3, layer.base_layer.in_features, dtype=torch.float64)
        with opened(state, names=MIXED), Products(layer.base_layer.weight) as products:
            layer(x)
        assert products.count == 1


def test_a_hook_on_the_base_layer_sees_the_whole_batch_once() -> None:
    model, state = subject()
    shapes: list[Any] = []
    model.first.base_layer.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    x = batch(torch.float64, 3)
    found = run(model, state, x)
    assert shapes == [(len(MIXED), 3, OUT)]
    assert_equal(found, run(model, state, x, around=alone), 1e-12)


def test_rows_are_found_once_for_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, state = subject()
    twelve = nn.Sequential(*(copy.deepcopy(model.last) for _ in range(5)))
    calls: list[Any] = []
    monkeypatch.setattr(routes, "make_slices", lambda *args: calls.append(args) or make_slices(*args))
    x = torch.randn(len(MIXED), 3, OUT, dtype=torch.float64)
    state = twelve[0].state
    for layer in twelve:
        layer.join(state)
    with opened(state, names=MIXED):
        twelve(x)
        assert len(calls) == 1
        twelve(x)
        assert len(calls) == 1


def test_what_backward_keeps() -> None:
    """The input once, and what has the rank as its width."""
    model, state = subject()
    layer: Any = model.first
    x = batch(torch.float64, 3)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), opened(state, names=MIXED):
        y = layer(x)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    size = sum(tensor.numel() for pointer, tensor in kept.items() if pointer not in parameters)
    ranks = sum(RANKS.get(name, 0) for name in MIXED)
    assert y.requires_grad
    assert size == x.numel() + 3 * ranks
