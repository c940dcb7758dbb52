"""Adapter names: what cannot be a name is refused, everything else works, also names that mean something to torch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from core_models import anatomy, net, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.checkpoint import get_peft_model_state_dict, load_all, save_adapters
from inlay.core.active import set_active
from inlay.core.call import opened
from inlay.core.eject import delete, eject
from inlay.core.inject import inject
from inlay.core.merge import merge, unmerge
from inlay.core.plan import plan
from inlay.core.state import BASE, State, check_adapter_name, find_state
from inlay.errors import AdapterNameError, UnknownAdapterError
from inlay.methods.loha import LoHaConfig
from inlay.methods.lora import LoraConfig

UNSAFE = [
    "",
    ".",
    "..",
    "a.b",
    "../x",
    "a/b",
    "a\\b",
    "/etc",
    "x\0y",
    "a\nb",
    "tab\t",
    "*",
    "a*",
    BASE,
    None,
    3,
    b"x",
    ["x"],
    "training",
]
HOSTILE = [
    "weight",
    "bias",
    "lora_A",
    "keys",
    "items",
    "default work",
    "0",
    "train",
    "eval",
    "_modules",
    "forward",
    "base_layer",
]
HOSTILE += [
    "modules_to_save",
    "original_module",
    "clear",
    "pop",
    "parameters",
    "__class__",
    "self",
    "ünïcode",
    "-",
    "T",
]


@pytest.mark.parametrize("name", UNSAFE, ids=repr)
def test_unsafe_name_is_refused(name: object) -> None:
    model = net()
    before = anatomy(model)
    with pytest.raises(AdapterNameError):
        plan(model, LoraConfig(target_modules=["q"]), name)  # type: ignore[arg-type]
    assert anatomy(model) == before


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=2, target_modules=["q", "embed"], modules_to_save=["head"]), LoHaConfig(r=2, target_modules=["q"])],
    ids=["modules", "tensors"],
)
def test_any_other_name_works_from_start_to_end(name: str, config: object, tmp_path: Path) -> None:
    model = net()
    reference = net()
    plain = inject(plan(reference, copy.deepcopy(config), "plain"), seed=1)
    inject(plan(reference, LoHaConfig(r=2, target_modules=["q", "k"]), "other"), seed=2)
    state = inject(plan(model, copy.deepcopy(config), name), seed=1)
    inject(plan(model, LoHaConfig(r=2, target_modules=["q", "k"]), "other"), seed=2)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(one, other)
        if one.requires_grad:
            with torch.no_grad():
                one.add_(0.1)
                other.add_(0.1)
    set_active(state, [name, "other"])
    set_active(plain, ["plain", "other"])
    expected = reference(tokens())
    assert torch.equal(model(tokens()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens()), expected)
    assert torch.equal(copy.deepcopy(model)(tokens()), expected)
    names = (name, BASE, "other")
    with opened(state, names=names), opened(plain, names=("plain", BASE, "other")):
        assert torch.equal(model(tokens()), reference(tokens()))
    ours = get_peft_model_state_dict(model, adapter_name=name)
    theirs = get_peft_model_state_dict(reference, adapter_name="plain")
    assert list(ours) == list(theirs)
    merge(state)
    assert torch.allclose(model(tokens()), expected, atol=1e-5)
    unmerge(state)
    save_adapters(model, tmp_path)
    twin = net()
    load_all(twin, tmp_path)
    assert torch.equal(twin(tokens()), expected)
    delete(model, state, name)
    assert list(state.records) == ["other"]
    before = dict(net().state_dict())
    eject(model, state)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@given(st.text(max_size=12))
@settings(max_examples=200, deadline=None)
def test_a_name_is_refused_or_can_be_a_module_and_a_folder(name: str) -> None:
    try:
        check_adapter_name(name)
    except AdapterNameError:
        return
    assert "." not in name
    assert Path("root", name).parent == Path("root")
    assert Path("root", name).name == name
    assert "\0" not in name


def test_taken_and_unknown_names() -> None:
    model = net()
    state = inject(plan(model, LoraConfig(target_modules=["q"]), "style"))
    before = anatomy(model)
    with pytest.raises(AdapterNameError, match="already"):
        plan(model, LoraConfig(target_modules=["k"]), "style")
    for action in (
        lambda: set_active(state, ["stile"]),
        lambda: merge(state, ["stile"]),
        lambda: delete(model, state, "stile"),
    ):
        with pytest.raises(UnknownAdapterError, match="'style'") as caught:
            action()
        assert isinstance(caught.value, KeyError)
        assert isinstance(caught.value, ValueError)
    assert anatomy(model) == before
    assert isinstance(find_state(model), State)
