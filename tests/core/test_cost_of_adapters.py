"""What adapters cost to put in, switch and delete, counted in Python calls: seconds depend on the machine."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_counts import calls
from torch import nn

import inlay
from inlay.core.follow import base_modules
from inlay.core.layer import AdaptedLayer
from inlay.core.policy import INLAY
from inlay.models import operate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)


class Tower(nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))


def config() -> inlay.LoraConfig:
    return inlay.LoraConfig(r=2, target_modules=["q", "v"])


def wrapped(blocks: int, adapters: int) -> inlay.PeftModel:
    model = inlay.get_peft_model(Tower(blocks), config(), "a0")
    for number in range(1, adapters):
        model.add_adapter(f"a{number}", config())
    return model


ACTIONS: dict[str, Callable[[inlay.PeftModel], object]] = {
    "set_adapter": lambda model: model.set_adapter("a1"),
    "two adapters": lambda model: model.set_adapter(["a1", "a0"]),
    "delete_adapter": lambda model: model.delete_adapter("a1"),
    "set_requires_grad": lambda model: model.set_requires_grad("a1", True),
    "add_adapter": lambda model: model.add_adapter("new", config()),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_an_operation_on_one_adapter_does_not_depend_on_how_many_there_are(name: str) -> None:
    counted = []
    for adapters in (3, 12):
        model = wrapped(2, adapters)
        ACTIONS[name](wrapped(2, 3))  # what is imported or remembered at the first call is no part of it
        counted.append(calls(lambda model=model: ACTIONS[name](model)))  # type: ignore[misc]
    few, many = counted
    differing = {key: (few[key], many[key]) for key in few | many if few[key] != many[key]}
    # a name that is refused or looked up is compared with each name, in expressions that call nothing else
    assert not differing


@pytest.mark.parametrize("adapters", [1, 3])
def test_injection_is_linear_in_the_number_of_layers(adapters: int) -> None:
    counted = {}
    for blocks in (4, 8, 16):
        inlay.get_peft_model(Tower(1), config())
        if adapters == 1:
            tower = Tower(blocks)
            found = calls(lambda tower=tower: inlay.get_peft_model(tower, config()))  # type: ignore[misc]
        else:
            model = wrapped(blocks, adapters - 1)
            found = calls(lambda model=model: model.add_adapter("new", config()))  # type: ignore[misc]
        counted[blocks] = found.total()
    assert counted[16] - counted[8] == 2 * (counted[8] - counted[4])


def test_a_failed_injection_is_undone_in_linear_time() -> None:
    def fail(*given: object) -> None:
        raise RuntimeError("too late")

    counted = {}
    for blocks in (1, 4, 8, 16):
        tower = Tower(blocks)

        def act(tower: nn.Module = tower) -> None:
            with pytest.raises(RuntimeError, match="too late"):
                operate.add(tower, config(), "a", policy=INLAY, then=fail)

        counted[blocks] = calls(act).total()
        assert not any(hasattr(module, "base_layer") for module in tower.modules())
    assert counted[16] - counted[8] == 2 * (counted[8] - counted[4])


def test_no_walk_enters_what_hangs_below_layers() -> None:
    model = wrapped(2, 5).get_base_model()
    paths = {id(module): name for name, module in model.named_modules()}
    visited = [paths[id(module)] for module in base_modules(model)]
    assert not any("lora" in path for path in visited)
    bare = [name for name, _ in Tower(2).named_modules()]
    assert [path.removesuffix(".base_layer") for path in visited if not path.endswith(".base_layer")] == bare


def test_sites_of_one_form_share_slots_and_nothing_that_can_be_written() -> None:
    tower = Tower(2)
    made = inlay.plan(tower, inlay.LoraConfig(r=2, target_modules=["q", "v"], rank_pattern={"blocks.1.v": 3}))
    by_path = {placement.place.path: placement for placement in made.placements}
    assert by_path["blocks.0.q"].slots is by_path["blocks.1.q"].slots
    assert by_path["blocks.1.v"].slots["A"].shape == (3, 4)
    assert by_path["blocks.0.v"].slots["A"].shape == (2, 4)
    inlay.inject(made)
    tower.blocks[0].q.scaling["default"] = 7.0  # type: ignore[union-attr,index]
    assert tower.blocks[1].q.scaling["default"] == 4.0  # type: ignore[union-attr,index]


def test_a_subclass_that_reads_names_is_asked_at_every_site() -> None:
    from inlay.core.affine import Site
    from inlay.methods.lora import LoRA

    class Counting(LoRA):
        def options(self, site: Site) -> dict[str, Any]:
            return {**super().options(site), "scaling": float(len(site.name))}

    one, other = Site("a", "linear", 4, 4), Site("bb", "linear", 4, 4)
    assert LoRA(config()).alike(one) == LoRA(config()).alike(other)
    assert Counting(config()).alike(one) != Counting(config()).alike(other)


def test_bare_modules_are_what_constructors_make() -> None:
    from inlay.core.bare import bare

    for cls in (nn.Conv2d, nn.ModuleDict):
        made, told = bare(cls), nn.Module()
        assert list(made.__dict__) == list(told.__dict__)
        for name, value in told.__dict__.items():
            assert type(made.__dict__[name]) is type(value)
            assert made.__dict__[name] == value
            if isinstance(value, (dict, set)):
                assert made.__dict__[name] is not bare(cls).__dict__[name]


def test_a_light_module_has_its_tables_once_they_are_asked_for() -> None:
    from inlay.core.bare import Light, Names, NoDropout, bare
    from inlay.kinds.linear import Factor

    told = nn.Module()
    for cls in (Names, NoDropout, Factor):
        made, other = bare(cls), bare(cls)
        assert len(made.__dict__) == 4 < len(told.__dict__)
        for name, value in told.__dict__.items():
            table = getattr(made, name)
            assert type(table) is type(value)
            assert table == value
            assert getattr(made, name) is table
            if isinstance(value, (dict, set)):
                assert table is not getattr(other, name)
                assert made.__dict__[name] is table
        for again in (copy.deepcopy(other), pickle.loads(pickle.dumps(bare(cls)))):
            assert type(again) is cls
    assert isinstance(bare(Names), nn.ModuleDict)
    assert repr(bare(Names)) == repr(nn.ModuleDict())
    assert repr(bare(NoDropout)) == repr(nn.Identity())
    assert issubclass(AdaptedLayer, Light)


def test_what_stands_for_no_dropout_is_there_once_it_is_asked_for() -> None:
    tower = Tower(1)
    for name, p in (("none", 0.0), ("other", 0.0)):
        inlay.inject(inlay.plan(tower, inlay.LoraConfig(r=2, target_modules=["q"], lora_dropout=p), name))
    layer: Any = tower.blocks[0].q
    assert "lora_dropout" not in dict(layer.named_children())
    assert list(layer.lora_dropout) == ["none", "other"]
    assert "lora_dropout" in dict(layer.named_children())
    assert layer.lora_dropout is layer.lora_dropout
    x = torch.randn(3, layer.in_features)
    with torch.no_grad():
        layer.lora_B["none"].weight.normal_()
        still = layer(x)
    layer.lora_dropout["none"] = nn.Dropout(1.0)
    assert torch.equal(tower.train().blocks[0].q(x), layer.base_layer(x))
    assert torch.equal(tower.eval().blocks[0].q(x), still)

    fresh = Tower(1)
    for name, p in (("none", 0.0), ("some", 0.5), ("more", 0.0)):
        inlay.inject(inlay.plan(fresh, inlay.LoraConfig(r=2, target_modules=["q"], lora_dropout=p), name))
    held = fresh.blocks[0].q.lora_dropout
    assert [type(held[name]) for name in ("none", "more")] == [type(layer.lora_dropout["other"])] * 2
    assert held["some"].p == 0.5
    with pytest.raises(AttributeError):
        fresh.blocks[0].q.vera_dropout  # noqa: B018


def test_hooks_on_the_modules_of_an_adapter_are_called() -> None:
    tower = Tower(1)
    layer: Any = tower.blocks[0].q
    inlay.inject(inlay.plan(tower, inlay.LoraConfig(r=2, target_modules=["q"])))
    layer = tower.blocks[0].q
    seen: list[str] = []
    factor, other = layer.lora_A["default"], layer.lora_B["default"]
    handle = factor.register_forward_hook(lambda *_: seen.append("after"))
    factor.register_forward_pre_hook(lambda *_: seen.append("before"))
    factor(torch.ones(1, factor.in_features))
    other(torch.ones(1, other.in_features))
    handle.remove()
    factor(torch.ones(1, factor.in_features))
    assert seen == ["before", "after", "before"]
    layer.lora_dropout["default"].register_state_dict_post_hook(lambda *_: seen.append("saved"))
    tower.state_dict()
    assert seen[3:] == ["saved"]


def test_values_do_not_depend_on_what_was_drawn_before() -> None:
    def values(*targets: str) -> torch.Tensor:
        tower = Tower(2)
        inlay.inject(inlay.plan(tower, inlay.LoraConfig(r=2, target_modules=list(targets))), seed=5)
        return tower.blocks[1].v.lora_A["default"].weight  # type: ignore[union-attr,index,return-value]

    assert torch.equal(values("v"), values("q", "v"))


def test_tensors_by_adapter_are_a_parameter_dict() -> None:
    """Code that walks a model looks for the dicts that torch has."""
    tower = Tower(1)
    inlay.inject(inlay.plan(tower, inlay.VeraConfig(r=2, target_modules=["q"])))
    held: Any = tower.blocks[0].q.vera_lambda_d
    assert isinstance(held, nn.ParameterDict)
    tensor = held["default"]
    assert list(held.keys()) == list(held) == ["default"]
    assert held.get("other") is None
    assert held.pop("default") is tensor
    assert len(held) == 0
    assert "default" not in held
    held["default"] = tensor
    held.clear()
    assert not list(held.parameters())
