"""Many adapters in one batch: every sample gets what its own adapter gives it alone, in one base product for all."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import inlay.core.mixed as mixed
import inlay.core.routes as routes
from inlay.core.active import set_active
from inlay.core.call import call_of, opened
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.state import BASE, State
from inlay.kernels.grouped import Slices, Updates, add_updates, make_slices
from inlay.kernels.routed_op import add_routed
from inlay.kernels.stacked import Stack
from inlay.kernels.switch import without_fast_paths
from inlay.methods.lora import LoraConfig
from inlay.methods.vera import VeraConfig

WIDTH, OUT = 12, 10
RANKS = {"a": 4, "b": 3, "c": 7}
MIXED = ("a", "c", BASE, "b", "a", "b", "c", "elsewhere")


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, OUT)
        self.last = nn.Linear(OUT, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh())


def subject(dtype: torch.dtype = torch.float64, policy: Any = None, **options: Any) -> tuple[nn.Module, State]:
    """Two layers with adapters of different ranks and scales; ``elsewhere`` is on the last one only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = Two().to(dtype)
        state: Any = None
        for i, (name, r) in enumerate([*RANKS.items(), ("elsewhere", 2)]):
            config = LoraConfig(
                r=r,
                lora_alpha=r * (i + 1),
                init_lora_weights=False,
                target_modules=["last"] if name == "elsewhere" else ["first", "last"],
                **options,
            )
            keywords = {} if policy is None else {"policy": policy}
            state = inject(plan(model, config, name, **keywords), seed=i)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        set_active(state, [*RANKS, "elsewhere"], trainable=True)
    return model, state


def batch(dtype: torch.dtype, *inner: int, samples: int = len(MIXED)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, *inner, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@contextmanager
def alone() -> Iterator[None]:
    """The oracle: a sub-batch for each adapter, by plain operators that autograd differentiates."""
    with without_fast_paths():
        yield


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor | None]:
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).cos().view(y.shape)
    (y.double() * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    found["x"] = x.grad
    for tensor in (x, *model.parameters()):
        tensor.grad = None
    return {"y": y.detach(), **found}


def run(
    model: nn.Module,
    state: State,
    x: Tensor,
    names: Sequence[str] = MIXED,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Tensor | None]:
    with opened(state, names=names), around():
        y = model(x) if forward is None else forward(x)
    return gradients(model, x, y)


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other is None) == (tensor is None), name
        if tensor is not None and other is not None:
            assert other.dtype == tensor.dtype, name
            size = max(float(tensor.abs().max()) if tensor.numel() else 0.0, 1e-3)
            torch.testing.assert_close(other.double(), tensor.double(), rtol=0, atol=tolerance * size, msg=name)


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("inner", [(), (1,), (5,), (2, 3), (400,)], ids=str)
def test_each_sample_as_if_alone(dtype: torch.dtype, inner: tuple[int, ...], taken: list[str]) -> None:
    """Short samples are sorted, long ones are left where they are."""
    model, state = subject(dtype)
    x = batch(dtype, *inner)
    found = run(model, state, x)
    assert taken == ["first", "last"]
    assert_equal(found, run(model, state, x, around=alone), TOLERANCE[dtype])


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


# -- stacks -----------------------------------------------------------------------------------------------------------


def stacks(state: State) -> list[Any]:
    call = call_of(state)
    assert call is not None
    assert call.routes is not None
    return list(call.routes.stacks.values())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("names", [MIXED, ("a", "b", "c"), ("a", "a", "b", "b"), ("b", "a") * 3], ids=len)
def test_a_batch_that_comes_again_is_served_by_a_stack(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    model, state = subject(dtype)
    x = batch(dtype, 2, samples=len(names)).detach()
    with torch.no_grad():
        with opened(state, names=names):
            first = model(x)
            assert not any(isinstance(stack, Stack) for stack in stacks(state))
            again = [model(x) for _ in range(2)]
            assert all(isinstance(stack, Stack) for stack in stacks(state))
        with opened(state, names=names), alone():
            expected = model(x)
    for y in (first, *again):
        assert_equal({"y": y}, {"y": expected}, TOLERANCE[dtype])


def test_a_stack_notices_what_its_factors_have_become() -> None:
    model, state = subject()
    layer: Any = model.last
    x = torch.randn(3, OUT, dtype=torch.float64)
    weight = layer.lora_A["a"].weight

    def in_place() -> None:
        weight.mul_(2)

    def other_parameter() -> None:
        layer.lora_A["a"].weight = nn.Parameter(torch.randn_like(weight))

    def assigned() -> None:
        tensors = {name: torch.randn_like(tensor) for name, tensor in layer.lora_B["b"].state_dict().items()}
        layer.lora_B["b"].load_state_dict(tensors, assign=True)

    def scaled() -> None:
        layer.scaling["c"] = 7.0

    with torch.no_grad(), opened(state, names=("a", "b", "c")):
        for change in (in_place, other_parameter, assigned, scaled):
            before = [layer(x) for _ in range(3)][-1]
            assert isinstance(stacks(state)[0], Stack)
            change()
            for _ in range(3):
                y = layer(x)
                with alone():
                    torch.testing.assert_close(y, layer(x))
            assert not torch.allclose(y, before)


def test_a_stack_ends_with_its_call_and_holds_no_adapter() -> None:
    model, state = subject()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with torch.no_grad(), opened(state, names=("a", "b", "c")):
        for _ in range(3):
            model(x)
        held = [weakref.ref(stack.A) for stack in stacks(state)]
        factor = weakref.ref(model.last.lora_A["a"].weight)
        copied = copy.deepcopy(model)
        assert copied.last.lora_A["a"].weight.data_ptr() != model.last.lora_A["a"].weight.data_ptr()
        model.last.delete_adapter("a")
        gc.collect()
        assert factor() is None
    gc.collect()
    assert all(ref() is None for ref in held)


def test_no_stack_where_gradients_are_wanted() -> None:
    model, state = subject()
    x = batch(torch.float64, 1)
    with opened(state, names=MIXED):
        for _ in range(3):
            model(x)
        assert not any(isinstance(stack, Stack) for stack in stacks(state))


# -- compiled ---------------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> tuple[Any, list[Any]]:
    """The model compiled whole, and the graphs made for it."""
    torch._dynamo.reset()
    graphs: list[Any] = []
    backend = torch._dynamo.lookup_backend("aot_eager")

    def make(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return backend(graph, inputs)

    return torch.compile(model, fullgraph=True, backend=make, dynamic=False), graphs


def test_compiled_one_graph_serves_any_order_of_a_set_of_adapters() -> None:
    model, state = subject()
    traced, graphs = compiled(model)
    x = batch(torch.float64, 3)
    arrangements = [MIXED, MIXED[::-1], ("b", "b", "b", BASE, "a", "c", "elsewhere", "c")]
    for names in arrangements:
        assert_equal(run(model, state, x, names, forward=traced), run(model, state, x, names), 1e-12)
    assert len(graphs) == 1
    names = ("a", "b") * 4
    found = run(model, state, x, names, forward=traced)
    assert_equal(found, run(model, state, x, names), 1e-12)
    assert found["first.lora_A.c.weight"] is None  # who has no sample gets no gradient, rather than one of zeros
    assert len(graphs) == 2
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum("add_routed" in target for target in called) == 2


def test_compiled_with_products_in_the_dtype_of_the_adapter() -> None:
    model, state = subject(torch.bfloat16, PEFT)
    traced, _ = compiled(model)
    x = batch(torch.bfloat16, 3)
    assert_equal(run(model, state, x, forward=traced), run(model, state, x), TOLERANCE[torch.bfloat16])


def test_the_operator_is_a_good_citizen() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    A, B = [random(2, 5), random(3, 5)], [random(4, 2), random(4, 3)]
    rows = torch.tensor([2, 0, 1, 2])
    torch.library.opcheck(add_routed, (random(4, 3, 4), random(4, 3, 5), A, B, [0.5, 2.0], rows, [0, 2]))
    torch.library.opcheck(add_routed, (random(4, 4), random(4, 5).detach(), A, B, [0.5, 2.0], rows, [0, 2]))
