"""Full copies of modules (``modules_to_save``): which one runs, what it shares, what must not lie inside."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.active import set_active
from inlay.core.call import opened
from inlay.core.eject import delete, eject
from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.mount import ModuleCopies
from inlay.core.plan import plan
from inlay.core.policy import PEFT
from inlay.core.state import State, find_state
from inlay.errors import RoutingError, TargetError, UnsupportedError
from inlay.methods.lora import LoraConfig


class Head(nn.Module):
    """Two layers that share their weight, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.dense.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.norm(self.dense(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(6, 6)
        self.head = Head()
        self.table = nn.ModuleList([nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dense(x))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def config(**options: Any) -> LoraConfig:
    options = {"r": 2, "target_modules": ["dense"], "modules_to_save": ["head"]} | options
    return LoraConfig(**options)


def model_of(*names: str) -> tuple[Any, Model, State]:
    """Return a model, untouched but for the copies, which are scaled by 2, 3, ..."""
    torch.manual_seed(0)
    model: Any = Model().eval()
    untouched = copy.deepcopy(model)
    for i, name in enumerate(names):
        state = inject(plan(model, config(), name))
        with torch.no_grad():
            for parameter in model.head.modules_to_save[name].parameters():
                parameter.mul_(2.0 + i)
    return model, untouched, state


def scaled(untouched: Model, by: float) -> Model:
    result = copy.deepcopy(untouched)
    with torch.no_grad():
        for parameter in result.head.parameters():
            parameter.mul_(by)
    return result


def test_the_active_copy_runs_and_is_seen() -> None:
    model, untouched, state = model_of("a", "b")
    original = model.head.original_module
    copies = model.head.modules_to_save
    for active, by in (("a", 2.0), ("b", 3.0)):
        set_active(state, [active])
        assert torch.equal(model(X), scaled(untouched, by)(X))
        assert model.head.dense is copies[active].dense
        assert model.head.norm.eps == original.norm.eps
    set_active(state, [])
    assert model.head.dense is original.dense
    set_active(state, ["a"])
    with opened(state, disabled=True):
        assert model.head.dense is original.dense
        assert torch.equal(model(X), untouched(X))
    with pytest.raises(AttributeError, match="nothing"):
        model.head.nothing  # noqa: B018


def test_weights_shared_inside_a_module_are_shared_inside_its_copy() -> None:
    model, _, _ = model_of("a")
    made = model.head.modules_to_save["a"]
    assert made.again.weight is made.dense.weight
    assert made.dense.weight is not model.head.original_module.dense.weight
    names = {name for name, _ in model.named_parameters() if "modules_to_save" in name}
    assert len(names) == 5  # the shared weight once, three biases, the norm's weight
    assert not any(p.requires_grad for p in model.head.original_module.parameters())
    assert all(p.requires_grad for p in made.parameters())


def test_only_the_copy_that_runs_gathers_statistics() -> None:
    model, untouched, state = model_of("a", "b")
    model.train()
    before = copy.deepcopy(model.head.state_dict())
    model(X)
    changed = {name for name, tensor in model.head.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition("norm.")[0] for name in changed} == {"modules_to_save.a."}
    eject(model, state)
    assert torch.equal(model.head.norm.running_mean, untouched.head.norm.running_mean)


def test_mixed_batch() -> None:
    model, untouched, state = model_of("a", "b")
    names = ["b", "__base__", "a", "b"]
    with opened(state, names=names):
        y = model(X)
        with pytest.raises(RoutingError, match="'weight' of 'head'"):
            _ = _weight(model)
    for i, by in enumerate((3.0, 1.0, 2.0, 3.0)):
        torch.testing.assert_close(y[i], scaled(untouched, by)(X)[i])
    with opened(state, names=["b"] * 4):
        assert model.head.dense is model.head.modules_to_save["b"].dense


def _weight(model: Any) -> Tensor:
    for copies in (model.head.original_module, *model.head.modules_to_save.values()):
        copies.weight = copies.dense.weight
    return model.head.weight


def test_threads() -> None:
    model, untouched, state = model_of("a", "b")
    expected = {name: scaled(untouched, by)(X) for name, by in (("a", 2.0), ("b", 3.0), ("", 1.0))}
    wrong: list[str] = []
    barrier = threading.Barrier(3)

    def work(name: str) -> None:
        barrier.wait()
        for _ in range(100):
            with opened(state, names=[name] * 4 if name else None, disabled=not name):
                if not torch.allclose(model(X), expected[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_deletion_and_eject() -> None:
    model, untouched, state = model_of("a", "b")
    set_active(state, ["b"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
        found = find_state(other)
        assert found is not None
        set_active(found, ["a"])
        assert torch.equal(other(X), scaled(untouched, 2.0)(X))
    delete(model, state, "b")
    assert list(model.head.modules_to_save) == ["a"]
    assert torch.equal(model(X), untouched(X))
    original = model.head.original_module
    delete(model, state, "a")
    assert model.head is original
    model, untouched, state = model_of("a")
    original = model.head.original_module
    eject(model, state)
    assert model.head is original
    model, untouched, state = model_of("a")
    made = model.head.modules_to_save["a"]
    eject(model, state, restore=False)
    assert model.head is made


def test_compiled() -> None:
    model, _, _ = model_of("a")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), model(X))


def test_attention_of_an_encoder_can_be_copied() -> None:
    """The fused path reads the weights of attention and would miss a call that switches the copy off."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
    model = nn.ModuleDict({"layer": layer, "lin": nn.Linear(6, 6)})
    untouched = copy.deepcopy(layer)
    state = inject(plan(model, config(target_modules=["lin"], modules_to_save=["self_attn"])))
    with torch.no_grad():
        model["layer"].self_attn.modules_to_save["default"].in_proj_weight.mul_(3)  # type: ignore[union-attr]
        x = torch.randn(2, 3, 6)
        assert not torch.allclose(model["layer"](x), untouched(x))
        with opened(state, disabled=True):
            torch.testing.assert_close(model["layer"](x), untouched(x))


@pytest.mark.parametrize("policy", [None, PEFT], ids=["inlay", "peft"])
@pytest.mark.parametrize("targets", [["dense"], r".*dense", "all-linear"], ids=str)
def test_what_lies_inside_is_trained_in_full_only(targets: Any, policy: Any) -> None:
    model = Model()
    made = plan(model, config(target_modules=targets), policy=policy)
    inside = [p.site.name for p in made.placements if p.site.name.startswith("head")]
    assert not inside
    assert made.placements[0].site.name == "dense"
    inject(made)
    assert not any(isinstance(module, AdaptedLayer) for module in model.head.modules())


def test_what_cannot_be_copied() -> None:
    with pytest.raises(TargetError, match=r"'table' is a ModuleList"):
        plan(Model(), config(modules_to_save=["table"]))
    with pytest.raises(TargetError, match=r"modules_to_save: haed matches nothing .*near: head"):
        plan(Model(), config(modules_to_save=["haed"]))
    with pytest.raises(TargetError, match=r"'head.dense' matches nothing outside of 'head'"):
        plan(Model(), config(target_modules=["head.dense"]))
    model = Model()
    inject(plan(model, config(modules_to_save=None), "a"))
    with pytest.raises(TargetError, match=r"'head' cannot be trained in full, because 'head.dense' is adapted"):
        plan(model, config(target_modules=["again"]), "b")
    model = Model()
    inject(plan(model, config(), "a"))
    with pytest.raises(TargetError, match=r"'head' is trained in full by modules_to_save of another adapter"):
        plan(model, LoraConfig(target_modules=r"head|dense"), "b")


def test_nested_names_are_copied_once() -> None:
    made = plan(Model(), config(modules_to_save=["head", "norm"]))
    assert [place.path for place, _ in made.copies] == ["head"]


def test_policy_peft_runs_one_copy_at_a_time() -> None:
    model = Model()
    for name in ("a", "b"):
        state = inject(plan(model, config(), name, policy=PEFT))
    with pytest.raises(UnsupportedError, match=r"'head': 'a', 'b' cannot be active together"):
        set_active(state, ["a", "b"])
    assert state.active == ("a",)
    assert isinstance(model.head, ModuleCopies)
    with pytest.raises(UnsupportedError, match="only one can run"):
        model.head.override(active=("a", "b"))


@pytest.mark.parametrize("trains", [True, False])
def test_a_copy_that_a_merge_leaves_has_the_gradient_flags_of_the_original(trains: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(not trains)
    model[1].requires_grad_(trains)
    original = model[1]
    wrapped = inlay.get_peft_model(model, inlay.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    merged = wrapped.merge_and_unload()
    assert merged[1] is not original
    assert [p.requires_grad for p in merged[0].parameters()] == [not trains] * 2
    assert [p.requires_grad for p in merged[1].parameters()] == [trains] * 2
