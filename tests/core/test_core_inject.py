"""Injection and its undoing: all or nothing, whatever fails and wherever; the base model's objects are kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from core_models import Net, anatomy, net, tokens
from torch import nn

from inlay.core import build as build_module
from inlay.core import hanging as hanging_module
from inlay.core import inject as inject_module
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.plan import Plan, plan
from inlay.core.state import State, find_state
from inlay.errors import AdapterNameError, StateError, TargetError
from inlay.methods.fourierft import FourierFTConfig
from inlay.methods.lora import LoraConfig
from inlay.methods.vera import VeraConfig

CONFIGS: dict[str, Callable[[], Any]] = {
    "everything": lambda: LoraConfig(
        r=2, target_modules=["q", "embed", "first"], modules_to_save=["head"], bias="all", use_dora=True
    ),
    "all-linear": lambda: LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, lora_bias=True),
    "vera": lambda: VeraConfig(r=2, target_modules=["k", "attn_k"]),
    "fourierft": lambda: FourierFTConfig(n_frequency=4, target_modules=["q"]),
}
# every function of ours that these modules call, so that new steps of an injection are tested too
STEPS = [
    (module, name)
    for module in (inject_module, build_module, hanging_module)
    for name, function in sorted(vars(module).items())
    if isinstance(function, FunctionType) and function.__module__.startswith("inlay.") and function is not inject
]


class Planted(Exception):
    """The fault that a test plants."""


def base(adapted: bool) -> Net:
    model = net(1)
    model.embed.eval()
    model.head.weight.requires_grad_(False)
    if adapted:
        inject(plan(model, LoraConfig(r=3, target_modules=["q", "head"]), "before"), seed=1)
    return model


def failing(monkeypatch: pytest.MonkeyPatch, module: ModuleType, step: str, at: int, after: bool) -> list[int]:
    """Let the ``at``-th call of a step raise, before or after it has done its work; return the count of calls."""
    real = getattr(module, step)
    calls = [0]

    def planted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at and not after:
            raise Planted(step)
        result = real(*args, **kwargs)
        if calls[0] == at:
            raise Planted(step)
        return result

    monkeypatch.setattr(module, step, planted)
    return calls


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "adapted"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_fault_at_any_step_leaves_the_model_as_it_was(config: str, adapted: bool) -> None:
    """Every call of every step is made to fail once, before and after its work."""
    reached: set[str] = set()
    for module, step in STEPS:
        for after in (False, True):
            at = 1
            while True:
                given = CONFIGS[config]()
                if adapted and config == "everything":
                    given.modules_to_save = None  # the head is adapted
                model = base(adapted)
                made = plan(model, given, "new")
                before, described = anatomy(model), given.to_dict()
                with pytest.MonkeyPatch.context() as monkeypatch:
                    calls = failing(monkeypatch, module, step, at, after)
                    try:
                        inject(made, seed=2)
                    except Planted:
                        reached.add(step)
                    else:
                        assert calls[0] < at
                        break
                assert anatomy(model) == before, f"{step}, call {at}, {'after' if after else 'before'} its work"
                assert given.to_dict() == described
                assert (find_state(model) is None) == (not adapted)
                inject(plan(model, given, "new"), seed=2)  # and it works when asked again
                at += 1
    assert len(reached) >= 8, f"only {sorted(reached)} were reached"


def test_what_belongs_to_an_injection_fails_with_it() -> None:
    for adapted in (False, True):
        model = base(adapted)
        config = LoraConfig(r=2, target_modules="all-linear", bias="all")
        if adapted:
            config.exclude_modules = ["head"]
        made = plan(model, config, "new")
        before = anatomy(model)

        def load(state: State) -> None:
            assert "new" in state.records
            raise Planted

        with pytest.raises(Planted):
            inject(made, then=load)
        assert anatomy(model) == before
        assert config.target_modules == "all-linear"


def test_the_tests_above_see_small_changes() -> None:
    """The record that they compare holds objects, flags and bytes."""
    model = base(True)
    changes: list[Callable[[], object]] = [
        lambda: model.layers[0].q.base_layer.bias.requires_grad_(True),
        lambda: model.layers[0].norm.eval(),
        lambda: setattr(model, "first", copy.deepcopy(model.first)),
        lambda: model.embed.weight.data[0, 0].add_(1e-6),
        lambda: find_state(model).records.clear(),  # type: ignore[union-attr]
        lambda: model.layers[0].q.lora_A.update({"ghost": nn.Identity()}),
    ]
    for change in changes:
        before = anatomy(model)
        change()
        assert anatomy(model) != before


def test_layers_stand_at_the_same_paths_around_the_same_objects() -> None:
    model = net()
    modules, tensors = dict(model.named_modules()), {id(p) for p in model.parameters()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    inject(plan(model, CONFIGS["everything"]()), seed=1)
    for path in ("embed", "first", "layers.0.q"):
        layer = model.get_submodule(path)
        assert isinstance(layer, AdaptedLayer)
        assert layer.base_layer is modules[path]
        assert layer.weight is modules[path].weight
        assert layer.weight.data_ptr() == pointers[f"{path}.weight"]
    assert tensors <= {id(p) for p in model.parameters()}
    assert type(model.layers[0].k) is nn.Linear
    assert model.head.original_module is modules["head"]


def test_only_the_adapter_trains() -> None:
    model = net()
    inject(plan(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"])), seed=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"layers.{i}.q.lora_{ab}.default.weight" for i in range(3) for ab in "AB"} | {
        "head.modules_to_save.default.weight",
        "head.modules_to_save.default.bias",
    }


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_trained_biases_are_given_back(mode: str) -> None:
    model = net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = inject(plan(model, LoraConfig(r=2, target_modules=["q"], bias=mode)), seed=1)
    biases = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")]
    assert len(biases) == (3 if mode == "lora_only" else 3 * 3 + 2)
    assert all("q.base_layer" in name for name in biases) == (mode == "lora_only")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    eject(model, state)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_eject_may_keep_what_training_changed() -> None:
    model = net()
    state = inject(plan(model, LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"], bias="all")), seed=1)
    with torch.no_grad():
        model.layers[0].k.bias.add_(1.0)
        model.head.modules_to_save["default"].weight.add_(1.0)
    eject(model, state, restore=False)
    assert torch.equal(model.layers[0].k.bias, net().layers[0].k.bias + 1)
    assert torch.equal(model.head.weight, net().head.weight + 1)
    assert type(model.head) is nn.Linear


def test_a_plan_is_for_the_model_as_it_was() -> None:
    model = net()
    stale = plan(model, LoraConfig(target_modules=["q"]), "one")
    inject(plan(model, LoraConfig(target_modules=["k"]), "one"))
    before = anatomy(model)
    with pytest.raises((StateError, AdapterNameError), match="one"):
        inject(stale)
    assert anatomy(model) == before


def test_the_plan_keeps_its_own_config() -> None:
    config = LoraConfig(r=2, target_modules=["q"])
    made = plan(net(), config)
    config.r = 5
    config.target_modules.add("k")
    state = inject(made)
    assert {layer.site.name for layer in state.layers()} == {f"layers.{i}.q" for i in range(3)}
    assert all(layer.r["default"] == 2 for layer in state.layers())
    assert state.records["default"].method.config.r == 2


def test_copies_and_adapters_do_not_share_a_module() -> None:
    for config in (
        LoraConfig(target_modules=["head"], modules_to_save=["head"]),
        LoraConfig(target_modules=["q"], modules_to_save=["nobody"]),
    ):
        model = net()
        before = anatomy(model)
        with pytest.raises(TargetError, match=r"head|nobody"):
            plan(model, config)
        assert anatomy(model) == before
    model = net()
    inject(plan(model, LoraConfig(target_modules=["q"], modules_to_save=["head"])))
    with pytest.raises(TargetError, match="head"):
        plan(model, LoraConfig(target_modules=["head"]), "second")


def counted(made: Plan) -> int:
    model = made.model
    inject(made)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_plan_counts_what_will_train_and_what_it_costs(config: str) -> None:
    made = plan(net(), CONFIGS[config]())
    before = sum(t.numel() * t.element_size() for t in made.model.state_dict().values())
    trainable, nbytes, total = made.trainable, made.nbytes, made.total
    assert total == sum(p.numel() for p in made.model.parameters())
    assert trainable == counted(made)
    tensors = {id(t): t for t in [*made.model.parameters(), *made.model.buffers()]}
    shared = find_state(made.model).shared  # type: ignore[union-attr]
    tensors |= {id(t): t for t in [*shared.parameters(), *shared.buffers()]}
    own = {id(t): t for t in net().state_dict().values()}
    assert own
    assert nbytes == sum(t.numel() * t.element_size() for t in tensors.values()) - _unshared(before)


def _unshared(whole: int) -> int:
    """Bytes of the base: ``state_dict`` names the shared layer twice."""
    layer = net().first
    return whole - sum(p.numel() * p.element_size() for p in layer.parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_planning_on_the_meta_device_says_the_same(config: str) -> None:
    real = plan(net(), CONFIGS[config]())
    with torch.device("meta"):
        model = Net(3, 6)
    before = anatomy(model)
    made = plan(model, CONFIGS[config]())
    assert anatomy(model) == before
    assert (made.trainable, made.total, made.nbytes) == (real.trainable, real.total, real.nbytes)
    assert [(p.place.path, p.slots.keys(), p.options) for p in made.placements] == [
        (p.place.path, p.slots.keys(), p.options) for p in real.placements
    ]
    inject(made)
    assert all(p.is_meta for name, p in model.named_parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_planning_leaves_the_model_alone(config: str) -> None:
    model = base(False)
    given = CONFIGS[config]()
    before, described = anatomy(model), given.to_dict()
    str(plan(model, given))
    assert anatomy(model) == before
    assert given.to_dict() == described
    assert torch.equal(model(tokens()), base(False)(tokens()))
