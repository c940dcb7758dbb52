"""The short way without gradients sees everything that can change between two calls."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowrank_models import OUT, WIDTH, One, adapted, batch, conv1d, linear, off_by
from torch import Tensor, nn

import inlay
import inlay.core.ready as ready
from inlay.core.active import set_active
from inlay.core.call import opened
from inlay.core.eject import delete
from inlay.core.merge import merge, unmerge
from inlay.core.policy import PEFT
from inlay.core.state import State
from inlay.kernels.switch import without_fast_paths


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call went the short way."""
    calls: list[bool] = []

    def counted(run: Callable[[Any, Tensor], Tensor | None]) -> Callable[[Any, Tensor], Tensor | None]:
        def count(self: Any, x: Tensor) -> Tensor | None:
            y = run(self, x)
            calls.append(y is not None)
            return y

        return count

    for cls in (ready.Ready, ready.ReadyUpdate):
        monkeypatch.setattr(cls, "run", counted(cls.run))
    return calls


def model_of(variant: str = "lora", build: Callable[[], nn.Module] = linear, **options: Any) -> nn.Module:
    return adapted(build(), variant, **options)[0].eval()


def generic(model: nn.Module, x: Tensor) -> Tensor:
    with without_fast_paths(), torch.no_grad():
        return model(x)


def switch(state: State, on: bool) -> None:
    state.enabled = on
    state.touch()


def add_to_A(model: nn.Module) -> None:
    model.layer.lora_A["number0"].weight.add_(1.0)


def add_to_data_of_B(model: nn.Module) -> None:
    model.layer.lora_B["number0"].weight.data.add_(1.0)


def new_data(model: nn.Module) -> None:
    model.layer.lora_A["number0"].weight.data = torch.ones(3, WIDTH, dtype=torch.float64)


def new_parameter(model: nn.Module) -> None:
    model.layer.lora_B["number0"].weight = nn.Parameter(torch.ones(OUT, 3, dtype=torch.float64))


def new_leaf(model: nn.Module) -> None:
    model.layer.lora_A["number0"] = nn.Linear(WIDTH, 3, bias=False).double()


def new_base(model: nn.Module) -> None:
    model.layer.base_layer = nn.Linear(WIDTH, OUT).double()


def new_base_weight(model: nn.Module) -> None:
    model.layer.base_layer.weight = nn.Parameter(torch.ones(OUT, WIDTH, dtype=torch.float64))


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()}, assign=True)


def parametrized(place: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight * 2

    def change(model: nn.Module) -> None:
        nn.utils.parametrize.register_parametrization(place(model), "weight", Twice())

    return change


def other_forward(place: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        module = place(model)
        old = module.forward
        module.forward = lambda x: old(x) * 3

    return change


def hooked(place: Callable[[nn.Module], nn.Module], before: bool) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        if before:
            place(model).register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        else:
            place(model).register_forward_hook(lambda module, args, y: y * 2)

    return change


def scaled(model: nn.Module) -> None:
    model.layer.scaling["number0"] = 7.0


def disabled(model: nn.Module) -> None:
    switch(model.layer.state, False)


def merged(model: nn.Module) -> None:
    merge(model.layer.state)
    model.layer.lora_A["number0"].weight.zero_()  # what is merged no longer reads it


def added(model: nn.Module) -> None:
    adapted(model, "lora")


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "A in place": add_to_A,
    "B through data": add_to_data_of_B,
    "A.data": new_data,
    "B replaced": new_parameter,
    "leaf replaced": new_leaf,
    "base replaced": new_base,
    "base weight replaced": new_base_weight,
    "assigned": assigned,
    "A parametrized": parametrized(lambda model: model.layer.lora_A["number0"]),
    "base parametrized": parametrized(lambda model: model.layer.base_layer),
    "forward of the layer": other_forward(lambda model: model.layer),
    "forward of the base": other_forward(lambda model: model.layer.base_layer),
    "hook on the layer": hooked(lambda model: model.layer, False),
    "hook on the base": hooked(lambda model: model.layer.base_layer, False),
    "hook before the layer": hooked(lambda model: model.layer, True),
    "scale": scaled,
    "disabled": disabled,
    "merged": merged,
    "merged in part": lambda model: merge(model.layer.state, keep="none"),
}


@pytest.mark.parametrize("shape", [(3, WIDTH), (1, 2, WIDTH)], ids=str)
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_change_is_seen(change: str, shape: tuple[int, ...], taken: list[bool]) -> None:
    model, x = model_of(), batch(*shape)
    before = model(x)
    assert taken == [True]
    CHANGES[change](model)
    for _ in range(2):
        assert off_by(model(x), generic(model, x)) <= 1e-12
    if not change.startswith("merged"):
        assert off_by(model(x), before) > 1e-3


@torch.no_grad()
def test_switching_and_deleting() -> None:
    model, state = adapted(linear(), "two")
    model.eval()
    x = batch(3, WIDTH)
    outputs = []
    for names in (["number0"], ["number1"], ["number0", "number1"], [], ["number1"]):
        set_active(state, names)
        outputs.append(model(x))
        assert off_by(outputs[-1], generic(model, x)) <= 1e-12
    assert torch.equal(outputs[1], outputs[4])
    assert off_by(outputs[0], outputs[1]) > 1e-3
    delete(model, state, "number1")
    assert off_by(model(x), generic(model, x)) <= 1e-12
    set_active(state, ["number0"])
    assert torch.equal(model(x), outputs[0])


@torch.no_grad()
def test_merging_and_unmerging_between_calls(taken: list[bool]) -> None:
    model, x = model_of(), batch(3, WIDTH)
    before = model(x)
    for _ in range(2):
        merge(model.layer.state)
        assert off_by(model(x), before) <= 1e-12
        switch(model.layer.state, False)
        assert off_by(model(x), model.layer.base_layer(x)) > 1e-3
        switch(model.layer.state, True)
        unmerge(model.layer.state)
        assert torch.equal(model(x), before)
    assert taken[-1]


@torch.no_grad()
def test_calls_and_modes(taken: list[bool]) -> None:
    model, x = model_of(lora_dropout=0.5), batch(3, WIDTH)
    before = model(x)
    base = model.layer.base_layer(x)
    with opened(model.layer.state, disabled=True):
        assert torch.equal(model(x), base)
    with opened(model.layer.state, names=["number0", "__base__", "number0"]):
        y = model(x)
        assert off_by(y[1], base[1]) <= 1e-12
        assert off_by(y[0], before[0]) <= 1e-12
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), before)
    with torch.inference_mode():
        assert torch.equal(model(x.clone()), before)
    assert taken[-1]
    with torch.enable_grad():
        assert model(x).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("change", [lambda m: m.float(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
@torch.no_grad()
def test_other_dtypes(change: Callable[[nn.Module], nn.Module], taken: list[bool]) -> None:
    model = model_of()
    model(batch(3, WIDTH))
    change(model)
    x = batch(3, WIDTH, dtype=model.layer.base_layer.weight.dtype)
    assert off_by(model(x), generic(model, x)) <= 8 * torch.finfo(x.dtype).eps
    assert taken[-1] or taken[-2]
    model.double()
    assert off_by(model(batch(3, WIDTH)), generic(model, batch(3, WIDTH))) <= 1e-12


@torch.no_grad()
def test_half_precision_base_under_both_policies(taken: list[bool]) -> None:
    for policy, short in ((None, True), (PEFT, False)):
        options = {} if policy is None else {"policy": policy}
        model, _ = adapted(linear(), dtype=torch.bfloat16, **options)
        x = batch(3, WIDTH, dtype=torch.bfloat16)
        taken.clear()
        y = model.eval()(x)
        assert taken == [short]
        assert off_by(y, generic(model, x)) <= 2**-6
        model.layer.lora_A["number0"].weight.data.mul_(3.0)  # a cast that was kept would not show it
        assert off_by(model(x), y) > 0.01
        assert off_by(model(x), generic(model, x)) <= 2**-6


@torch.no_grad()
def test_copies_have_a_way_of_their_own(taken: list[bool]) -> None:
    model, x = model_of(), batch(3, WIDTH)
    before = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), before)
        twin.layer.lora_A["number0"].weight.add_(1.0)
        twin.layer.base_layer.weight.add_(1.0)
        assert off_by(twin(x), generic(twin, x)) <= 1e-12
        assert torch.equal(model(x), before)
    assert all(taken[:1])


@torch.no_grad()
def test_functional_call_and_transforms(taken: list[bool]) -> None:
    model, x = model_of(), batch(3, WIDTH)
    before = model(x)
    doubled = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model)
    twin.load_state_dict(doubled)
    assert off_by(torch.func.functional_call(model, doubled, (x,)), twin(x)) <= 1e-12
    assert torch.equal(model(x), before)
    many = torch.func.vmap(lambda row: model(row))(x)
    assert off_by(many, before) <= 1e-12
    y, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    assert off_by(y, before) <= 1e-12
    assert off_by(tangent, model(x + 1) - before) <= 1e-10


@torch.no_grad()
def test_inputs_that_are_not_dense_rows() -> None:
    model, x = model_of(), batch(3, WIDTH)
    assert off_by(model(x.to_sparse()), model(x)) <= 1e-12
    nested = torch.nested.nested_tensor([x[:1], x[1:]])
    assert off_by(torch.cat(model(nested).unbind()), model(x)) <= 1e-12
    assert model(nn.Parameter(x)).shape == (3, OUT)
    with pytest.raises(TypeError):
        model([1.0, 2.0])
    with pytest.raises(RuntimeError):
        model(torch.ones(3, WIDTH, dtype=torch.long))
    with pytest.raises(RuntimeError):
        model(batch(3, WIDTH + 1))


@torch.no_grad()
def test_tensors_of_inference_mode(taken: list[bool]) -> None:
    model, x = model_of(), batch(3, WIDTH)
    model(x)
    with torch.inference_mode():
        model.load_state_dict({name: tensor * 2 for name, tensor in model.state_dict().items()}, assign=True)
        assert off_by(model(x), generic(model, x)) <= 1e-12


@torch.no_grad()
def test_conv1d_goes_the_short_way(taken: list[bool]) -> None:
    model, x = model_of(build=conv1d), batch(2, 3, WIDTH)
    assert off_by(model(x), generic(model, x)) <= 1e-12
    assert taken[0]


@torch.no_grad()
def test_global_hooks_run() -> None:
    model, x = model_of(), batch(3, WIDTH)
    model(x)
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        model(x)
    finally:
        handle.remove()
    assert nn.Linear in seen
    assert One in seen


@torch.no_grad()
def test_jit_traces_parameters_not_copies() -> None:
    for grad in (False, True):
        model, x = model_of(), batch(3, WIDTH)
        model(x)
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(model, x)
        model.layer.lora_A["number0"].weight.add_(1.0)
        assert off_by(traced(x), generic(model, x)) <= 1e-12


@pytest.mark.parametrize("same", [True, False], ids=["same model", "other models"])
def test_threads(same: bool) -> None:
    models = [model_of()] * 2 if same else [model_of(), model_of(build=lambda: linear(bias=False))]
    xs = [batch(3, WIDTH), batch(3, WIDTH) * 2]
    expected = [generic(model, x) for model, x in zip(models, xs, strict=True)]
    errors: list[float] = []

    def work(i: int) -> None:
        with torch.no_grad():
            errors.extend(off_by(models[i](xs[i]), expected[i]) for _ in range(60))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 120
    assert max(errors) <= 1e-12


def test_the_wrapped_model_goes_the_short_way(taken: list[bool]) -> None:
    config = inlay.LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False)
    model = inlay.get_peft_model(linear(), config).eval()
    with torch.no_grad():
        y = model(batch(3, WIDTH, dtype=torch.float32))
        assert taken == [True]
        assert off_by(y, generic(model, batch(3, WIDTH, dtype=torch.float32))) <= 1e-6


@torch.no_grad()
def test_a_mode_that_changes_is_seen_without_a_new_version(taken: list[bool]) -> None:
    model, x = model_of(lora_dropout=0.5), batch(3, WIDTH)
    before = model(x)
    version = model.layer.state.version
    for trained, short in ((1, [True, True]), (2, [True])):  # the first call in another mode takes the ordinary way
        model.train()
        for _ in range(trained):
            assert not torch.equal(model(x), before)
        model.eval()
        taken.clear()
        for _ in range(2):
            assert torch.equal(model(x), before)
        assert taken == short
    assert model.layer.state.version == version


@torch.no_grad()
def test_hooks_that_go_open_the_short_way_again(taken: list[bool]) -> None:
    for model in (model_of(), adapted(linear(), "lora")[0].eval()):
        if taken:
            merge(model.layer.state)
        x = batch(3, WIDTH)
        before = model(x)
        for module in (model.layer, model.layer.base_layer):
            handle = module.register_forward_hook(lambda module, args, y: y * 2)
            assert off_by(model(x), before) > 1e-3
            assert not taken[-1]
            handle.remove()
            assert torch.equal(model(x), before)
            assert taken[-1]


@torch.no_grad()
def test_traced_by_jit_it_keeps_its_parameters(taken: list[bool]) -> None:
    model, x = model_of(), batch(1, 2, WIDTH)
    before = model(x)
    traced = torch.jit.trace(model, (x,), check_trace=False)
    assert not taken[-1]
    other = batch(1, 5, WIDTH)
    assert off_by(traced(x), before) <= 1e-12
    assert off_by(traced(other), model(other)) <= 1e-12
