"""Any name of a module or an adapter: keys and tensors mean each other, one to one."""

from __future__ import annotations

import copy
import re
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_to_save import CONFIGS, adapted, assert_same, net, shaken
from torch import nn

from inlay.checkpoint import adapter_slots, adapter_tensors, load_all, save_adapters, set_peft_model_state_dict
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.policy import INLAY, PEFT
from inlay.core.registry import config_class
from inlay.core.state import check_adapter_name
from inlay.core.targets import places
from inlay.errors import CheckpointError, CheckpointMismatchError

# Names that slots, mounts, wrappers and other adapters use; and plain ones.
HOSTILE = [
    *["weight", "bias", "lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "default", "base_layer"],
    *[
        "modules_to_save",
        "original_module",
        "token_adapter",
        "base_model",
        "model",
        "_orig_mod",
        "module",
        "lin",
        "mlp",
    ],
    *["lin", "mlp", "lora", "A", "0", "*", "vera_A", "shared", "hada_w1_a"],
]
MODULES = st.sampled_from([name for name in HOSTILE if name not in ("weight", "bias")]) | st.text(
    string.ascii_letters + string.digits + "_- ", min_size=1, max_size=3
)
ADAPTERS = st.sampled_from([name for name in HOSTILE if name != "*"]) | st.text(
    string.ascii_letters + "_-", min_size=1, max_size=6
)


class Box(nn.Module):
    """A module with any children; attributes cannot hide them, because nothing asks for attributes."""

    def put(self, name: str, child: nn.Module) -> None:
        self._modules[name] = child


@st.composite
def trees(draw: st.DrawFn) -> tuple[nn.Module, list[str], list[str]]:
    """A model of nested boxes, the paths of its linear layers, and some of them to be trained in full."""
    leaves: list[str] = []

    def grow(path: tuple[str, ...], depth: int) -> nn.Module:
        box = Box()
        for name in draw(st.lists(MODULES, min_size=1, max_size=3, unique=True)):
            if depth and draw(st.booleans()):
                box.put(name, grow((*path, name), depth - 1))
            else:
                box.put(name, nn.Linear(2, 2))
                leaves.append(".".join((*path, name)))
        return box

    model = grow((), 2)
    copied = draw(st.lists(st.sampled_from(leaves), max_size=1)) if len(leaves) > 1 else []
    return model, [leaf for leaf in leaves if leaf not in copied], copied


def build(tree: nn.Module, leaves: list[str], copied: list[str], names: list[str], dora: bool) -> nn.Module:
    for name in names:
        # whole paths as regular expressions: suffixes would match more
        targets = "|".join(map(re.escape, leaves))
        config = config_class("LORA")(r=1, target_modules=targets, use_dora=dora)
        made = plan(tree, config, name)
        if copied:
            made.copies = [(place, place.path) for place in places(tree) if place.path in copied]
        inject(made)
    return tree


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees(), st.lists(ADAPTERS, min_size=1, max_size=3, unique=True), st.booleans(), st.data())
def test_keys_and_tensors_mean_each_other(tree, names, dora, data):
    base, leaves, copied = tree
    model = build(copy.deepcopy(base), leaves, copied, names, dora)
    again = build(copy.deepcopy(base), leaves, copied, names, dora)
    seen: set[int] = set()
    for name in names:
        slots = adapter_slots(model, name)
        per_layer = 3 if dora else 2
        assert len(slots) == per_layer * len(leaves) + 2 * len(copied)
        for target in slots.values():
            assert id(target.tensor) not in seen
            seen.add(id(target.tensor))
        shaken(model, name)
        for leaf in leaves:  # rendered as documented
            assert f"{leaf}.lora_A.weight" in slots
            assert f"{leaf}.lora_magnitude_vector" in slots or not dora
    for name in names:
        values = adapter_tensors(model, name)
        prefixed = {f"base_model.model.{key}": value for key, value in values.items()}
        to_load = data.draw(st.sampled_from([values, prefixed]))
        others = {other: adapter_tensors(again, other) for other in names if other != name}
        others = {other: {key: value.clone() for key, value in held.items()} for other, held in others.items()}
        set_peft_model_state_dict(again, to_load, name)
        assert_same(adapter_tensors(again, name), values)
        for other, held in others.items():
            assert_same(adapter_tensors(again, other), held)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=trees(), inside=ADAPTERS, name=ADAPTERS)
def test_old_keys_with_the_adapters_name_inside(tree, inside, name):
    """Very old files have ``lin.lora_A.<name>.weight``; the name may be any, if it is one."""
    base, leaves, copied = tree
    model = build(copy.deepcopy(base), leaves, copied, [name], False)
    shaken(model, name)
    values = adapter_tensors(model, name)
    old = {}
    for leaf in leaves:
        for part in ("lora_A", "lora_B"):
            old[f"{leaf}.{part}.{inside}.weight"] = values[f"{leaf}.{part}.weight"]
    for leaf in copied:
        for part in ("weight", "bias"):
            old[f"{leaf}.modules_to_save.{inside}.{part}"] = values[f"{leaf}.{part}"]
    again = build(copy.deepcopy(base), leaves, copied, [name], False)
    set_peft_model_state_dict(again, old, name)
    assert_same(adapter_tensors(again, name), values)


def test_adapter_named_like_a_module(tmp_path):
    """Report R2: a second adapter called like a module made PEFT save nothing at all."""
    model, _ = adapted(CONFIGS["LORA"]["linear"](), "default")
    for name in ("lin", "lora_A", "weight"):
        adapted(CONFIGS["LORA"]["linear"](), name, model)
    expected = adapter_tensors(model, "default")
    assert len(expected) == 4
    save_adapters(model, tmp_path)
    again = net()
    load_all(again, tmp_path)
    for name in ("default", "lin", "lora_A", "weight"):
        assert_same(adapter_tensors(again, name), adapter_tensors(model, name))


@pytest.mark.parametrize("extra", ["lin.lora_A.weight.more", "no_such.lora_A.weight", "wide.lora_B.weight", "x"])
def test_keys_that_mean_nothing_here(extra):
    """Report R1: a layer that does not exist, or is not targeted, was dropped in silence."""
    config = config_class("LORA")(r=2, target_modules=["lin"])
    strict, _ = adapted(config, policy=INLAY)
    values = {**adapter_tensors(strict), extra: torch.zeros(2, 8)}
    with pytest.raises(CheckpointMismatchError, match=r"1 keys of the checkpoint mean nothing .*" + extra):
        set_peft_model_state_dict(strict, values)
    lenient, _ = adapted(config_class("LORA")(r=2, target_modules=["lin"]), policy=PEFT)
    assert set_peft_model_state_dict(lenient, values).unexpected_keys == [extra]


def test_two_tensors_with_one_key_are_refused():
    """A trained copy with a child called ``original_module`` meets the base biases below the copy's mount."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(2, 2)
            self.head = nn.Sequential()
            self.head.add_module("original_module", nn.Linear(2, 2))
            self.head.add_module("0", nn.Linear(2, 2))

    odd = Odd()
    odd.head.original_module.add_module("original_module", nn.Linear(2, 2))
    inject(plan(odd, config_class("LORA")(r=1, target_modules=["lin"], modules_to_save=["head"], bias="all")))
    with pytest.raises(CheckpointError, match="would both be saved as"):
        adapter_slots(odd)


@pytest.mark.parametrize("name", ["a/b", "..", "a.b", "", "a\\b", "x\0", "*"])
def test_unsafe_names_reach_no_file_system(name, tmp_path):
    with pytest.raises(ValueError, match="adapter"):
        check_adapter_name(name)
    model, state = adapted(CONFIGS["LORA"]["linear"](), "ok")
    state.records[name] = state.records.pop("ok")  # whatever a caller did
    with pytest.raises(ValueError, match="adapter"):
        save_adapters(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
