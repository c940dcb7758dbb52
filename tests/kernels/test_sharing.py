"""Layers that read one tensor: found while they run, one product for all, one mask, nothing left over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowrank_models import Three, adapted, assert_same, batch, off_by, run, run_generic, three
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import inlay.core.sharing as sharing
from inlay.core.active import set_active
from inlay.core.policy import INLAY

JOINT = dataclasses.replace(INLAY, share_inputs=True)
APART = dataclasses.replace(INLAY, share_inputs=False)
NAMES = ("q", "k", "v", "o")
aten = torch.ops.aten
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.addmm_.default, aten.linear.default}


class Counted(TorchDispatchMode):
    """Counts products, and the shapes of what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func in PRODUCTS
        return func(*args, **(kwargs or {}))


def products(function: Callable[[], Any]) -> int:
    with Counted() as mode:
        function()
    return mode.products


def model_of(policy: Any = JOINT, variant: str = "lora", **options: Any) -> nn.Module:
    return adapted(three(), variant, policy, targets=NAMES, **options)[0]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """Nothing that an earlier test left in this thread."""
    sharing._seen.__init__()  # type: ignore[misc]
    sharing._seen.x = sharing._seen.leader = sharing._seen.key = sharing._seen.mask = None


def test_products_are_counted_with_companions_and_without() -> None:
    """Four layers: base and up product each; down one each, or one for q, k and v together and one for o."""
    joint, apart, x = model_of(), model_of(APART), batch(5, 12).requires_grad_()
    assert products(lambda: joint(x)) == 12  # they have to be seen first
    assert products(lambda: joint(x)) == 10
    assert products(lambda: joint(x)) == 10
    for _ in range(2):
        assert products(lambda: apart(x)) == 12
    ys = joint(x), apart(x)
    # backward: by layer dX of the base, dt and dB; and by shrink product dX and dA
    counted = [products(y.sum().backward) for y in ys]
    assert counted[1] - counted[0] == 4


def test_policy_inlay_joins_nothing_on_a_cpu() -> None:
    model, x = model_of(INLAY), batch(5, 12).requires_grad_()
    assert [products(lambda: model(x)) for _ in range(3)] == [12, 12, 12]


@pytest.mark.parametrize("variant", ["lora", "two", "dora", "vera", "rslora"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (0, 12), (12,)], ids=str)
def test_results_are_those_of_each_alone(variant: str, shape: tuple[int, ...]) -> None:
    model, x = model_of(variant=variant), batch(*shape)
    expected = run_generic(model, x)
    for _ in range(3):
        assert_same(run(model, x), expected, 1e-12)
    with torch.no_grad():
        for _ in range(3):
            assert off_by(model(x), expected["y"]) <= 1e-12


def test_different_ranks_are_joined() -> None:
    model = model_of(rank_pattern={"q": 1, "v": 7})
    expected = run_generic(model, batch(5, 12))
    run(model, batch(5, 12))
    assert products(lambda: model(batch(5, 12).requires_grad_())) == 10
    assert_same(run(model, batch(5, 12)), expected, 1e-12)


class Fickle(Three):
    """Its ``v`` reads another tensor when told so, its ``k`` may stay away, and ``between`` runs after ``q``."""

    mode = ""
    between: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        y = self.q(x)
        if self.between is not None:
            self.between(x)
        if self.mode != "no k":
            y = y.tanh() * self.k(x)
        return self.o(self.v(x * 2 if self.mode == "other v" else x)) + y


def fickle(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return adapted(Fickle(), "lora", JOINT, targets=NAMES, **options)[0]


@pytest.mark.parametrize("mode", ["no k", "other v"])
def test_a_companion_that_stays_away_is_forgotten(mode: str) -> None:
    model, x = fickle(), batch(5, 12)
    run(model, x)
    run(model, x)
    assert len(sharing._companions[model.q]) == 2
    model.mode = mode
    for _ in range(2):
        assert_same(run(model, x), run_generic(model, x), 1e-12)
    assert [c[0]() for c in sharing._companions[model.q]] == [model.v if mode == "no k" else model.k]
    model.mode = ""
    for _ in range(3):  # and found again
        assert_same(run(model, x), run_generic(model, x), 1e-12)
    assert len(sharing._companions[model.q]) == 2


def change_input(model: nn.Module, x: Tensor) -> None:
    x.mul_(-2.0)


def change_A(model: nn.Module, x: Tensor) -> None:
    model.k.lora_A["number0"].weight.data.add_(1.0)
    with torch.no_grad():
        model.k.lora_A["number0"].weight.add_(1.0)


def replace_A(model: nn.Module, x: Tensor) -> None:
    leaf = model.v.lora_A["number0"]
    leaf.weight = nn.Parameter(leaf.weight.detach() + 1.0)


def data_of_A(model: nn.Module, x: Tensor) -> None:
    leaf = model.v.lora_A["number0"]
    leaf.weight.data = leaf.weight.detach() + 1.0


def replace_B(model: nn.Module, x: Tensor) -> None:
    leaf = model.v.lora_B["number0"]
    leaf.weight = nn.Parameter(leaf.weight.detach() + 1.0)


def change_scale(model: nn.Module, x: Tensor) -> None:
    model.k.scaling["number0"] = model.k.scaling["number0"] + 1.0


def switch_off(model: nn.Module, x: Tensor) -> None:
    model.k.enable_adapters(False)


CHANGES = [change_input, change_A, replace_A, data_of_A, replace_B, change_scale, switch_off]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_what_changes_between_two_companions_is_seen(change: Any, grad: bool) -> None:
    models = [fickle().train(), fickle().train()]
    ys = []
    for model, generic in zip(models, (False, True), strict=True):
        x = batch(5, 12)
        for _ in range(2):
            run(model, x)
        model.between = lambda inner, model=model: change(model, inner)
        with torch.set_grad_enabled(grad):
            if generic:
                from inlay.kernels.switch import without_fast_paths

                with without_fast_paths():
                    ys.append(model(x).detach())
            else:
                ys.append(model(x).detach())
    assert off_by(*ys) <= 1e-12


def test_a_forward_that_dies_leaves_nothing_to_the_next() -> None:
    model, x = fickle(), batch(5, 12)
    for _ in range(2):
        run(model, x)

    def die(inner: Tensor) -> None:
        raise RuntimeError("out of memory")

    model.between = die
    with pytest.raises(RuntimeError, match="out of memory"):
        model(x)
    model.between = None
    for _ in range(3):
        assert_same(run(model, x * 3), run_generic(model, x * 3), 1e-12)


def test_modes_of_gradients_do_not_mix() -> None:
    """``q`` runs without gradients, ``k`` and ``v`` with them, on the same tensor."""
    model, x = model_of().train(), batch(5, 12)
    for _ in range(2):
        run(model, x)
    with torch.no_grad():
        model.q(x)
    model.k(x).sum().backward()
    assert model.k.lora_A["number0"].weight.grad is not None


def test_switching_adapters_between_forwards() -> None:
    model, state = adapted(three(), "two", JOINT, targets=NAMES)
    x = batch(5, 12)
    for names in (["number0"], ["number1"], ["number1", "number0"], ["number0"]):
        set_active(state, names, trainable=True)
        expected = run_generic(model, x)
        for _ in range(3):
            assert_same(run(model, x), expected, 1e-12)


@pytest.mark.parametrize("policy", [JOINT, INLAY], ids=["joint", "apart"])
def test_the_mask_is_common_from_the_first_forward_on(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = sharing.Mask
    monkeypatch.setattr(sharing, "Mask", lambda x, p: made.append(x.shape) or real(x, p))  # type: ignore[func-returns-value]
    model, x = model_of(policy, lora_dropout=0.5).train(), batch(5, 12)
    for forward in range(3):
        made.clear()
        run(model, x)
        assert made == [(5, 12), (5, 10)], forward


def test_same_seeds_give_the_same_whatever_was_seen() -> None:
    model, x = model_of(lora_dropout=0.5).train(), batch(5, 12)
    found = []
    for _ in range(3):  # apart, then joined
        torch.manual_seed(5)
        found.append(run(model, x))
    assert_same(found[1], found[0], 1e-12)
    assert_same(found[2], found[1], 0.0)
    torch.manual_seed(6)
    assert off_by(run(model, x)["y"], found[0]["y"]) > 1e-3


def test_deterministic_algorithms_join_nothing() -> None:
    model, x = model_of(), batch(5, 12).requires_grad_()
    model(x)
    torch.use_deterministic_algorithms(True)
    try:
        first = model(x)
        assert products(lambda: model(x)) == 12
        assert torch.equal(model(x), first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("parts", ["whole", "each layer"])
def test_checkpoints(reentrant: bool, p: float, parts: str) -> None:
    """A block is recomputed as it ran, also where every layer has a checkpoint of its own."""
    model = model_of(lora_dropout=p).train()
    for _ in range(2):
        run(model, batch(5, 12))

    def forward(x: Tensor, wrap: Callable[..., Tensor]) -> Tensor:
        if parts == "whole":
            return wrap(model, x)
        return wrap(model.o, wrap(model.v, x)) + wrap(model.q, x).tanh() * wrap(model.k, x)

    def wrap(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=reentrant)

    found = []
    # a block of its own draws masks of its own; otherwise a checkpoint changes nothing
    for way in (wrap, wrap if p and parts == "each layer" else lambda module, x: module(x)):
        torch.manual_seed(3)
        found.append(run_forward(model, batch(5, 12), lambda x, way=way: forward(x, way)))
        torch.rand(3)
    assert_same(found[0], found[1], 1e-12)
    if p:  # the recomputed masks are those of the forward: numeric slope along x
        torch.manual_seed(3)
        x = batch(5, 12)
        step = 1e-6 * torch.ones_like(x)
        values = []
        for sign in (1, -1):
            torch.manual_seed(3)
            values.append(run_forward(model, x + sign * step, lambda x: forward(x, wrap))["y"])
        weights = torch.linspace(-1.0, 2.0, values[0].numel(), dtype=torch.float64).cos().view_as(values[0])
        slope = float(((values[0] - values[1]) * weights).sum()) / 2e-6
        assert abs(slope - float(found[0]["x"].sum())) <= 1e-5 * max(1.0, abs(slope))


def run_forward(model: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    class Way(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    return run(Way(), x)


def test_threads_do_not_see_each_others_inputs() -> None:
    import threading

    model, x = model_of(), batch(5, 12)
    expected = run_generic(model, x)["y"]
    errors: list[float] = []

    def work(factor: float) -> None:
        own = x * factor
        wanted = expected if factor == 1.0 else reference
        for _ in range(40):
            errors.append(off_by(model(own).detach(), wanted))

    reference = run_generic(model, x * 2.0)["y"]
    threads = [threading.Thread(target=work, args=(factor,)) for factor in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 80
    assert max(errors) <= 1e-12


def test_a_model_that_is_gone_is_not_held() -> None:
    import gc
    import weakref

    model, x = model_of(), batch(5, 12)
    for _ in range(2):
        run(model, x)
    gone = weakref.ref(model.q)
    del model
    gc.collect()
    assert gone() is None
