"""Several adapters in one folder: names, order, active set, scales and switch come back."""

from __future__ import annotations

import json

import pytest
import torch
from models_to_save import CONFIGS, adapted, assert_same, everything, net, shaken, tokens

import inlay
from inlay.checkpoint import adapter_tensors, load_all, read_manifest, save_adapters
from inlay.checkpoint.manifest import Manifest
from inlay.core.active import set_active
from inlay.core.state import find_state
from inlay.errors import AdapterNameError, CheckpointError, CheckpointMismatchError, UnknownAdapterError

ORDER = ["zebra", "default", "alpha", "mid"]
METHODS = {
    "zebra": ("LORA", "linear"),
    "default": ("IA3", "kinds"),
    "alpha": ("LORA", "dora"),
    "mid": ("LOHA", "kinds"),
}


def several():
    model = net()
    for name in ORDER:
        method, case = METHODS[name]
        adapted(CONFIGS[method][case](), name, model)
        shaken(model, name)
    state = find_state(model)
    set_active(state, ["mid", "zebra", "alpha"])
    model.lin.scaling["zebra"] = 3.25
    model.lin.scaling["alpha"] = 1 / 3
    return model, state


def test_everything_comes_back(tmp_path):
    model, state = several()
    save_adapters(model, tmp_path)
    again = net()
    manifest = load_all(again, tmp_path)
    found = find_state(again)
    assert list(found.records) == ORDER
    assert found.active == ("mid", "zebra", "alpha")
    assert found.enabled
    assert again.lin.scaling["zebra"] == 3.25
    assert again.lin.scaling["alpha"] == 1 / 3
    assert again.wide.scaling["zebra"] == model.wide.scaling["zebra"] != 3.25
    for name in ORDER:
        assert_same(adapter_tensors(again, name), adapter_tensors(model, name))
    assert torch.equal(again(tokens()), model(tokens()))
    assert manifest == read_manifest(tmp_path)
    set_active(found, ["default"])
    set_active(state, ["default"])
    assert torch.equal(again(tokens()), model(tokens()))


def test_switched_off_comes_back_switched_off(tmp_path):
    model, state = several()
    state.enabled = False
    state.touch()
    save_adapters(model, tmp_path)
    again = net()
    load_all(again, tmp_path)
    assert torch.equal(again(tokens()), net()(tokens()))
    assert find_state(again).enabled is False


def test_a_part_of_them(tmp_path):
    model, _ = several()
    save_adapters(model, tmp_path, selected_adapters=["alpha", "default"])
    assert not (tmp_path / "zebra").exists()
    assert read_manifest(tmp_path).active == ("alpha",)
    again = net()
    load_all(again, tmp_path, adapters=["default"])
    assert list(find_state(again).records) == ["default"]
    assert find_state(again).active == ()
    with pytest.raises(UnknownAdapterError, match="zebra"):
        load_all(net(), tmp_path, adapters=["zebra"])


def test_names_that_are_taken(tmp_path):
    model, _ = several()
    save_adapters(model, tmp_path)
    taken, state = adapted(CONFIGS["LORA"]["linear"](), "alpha")
    before = everything(taken)
    with pytest.raises(AdapterNameError, match="alpha"):
        load_all(taken, tmp_path)
    assert list(state.records) == ["alpha"]
    assert_same(everything(taken), before)


def test_beside_adapters_that_are_there(tmp_path):
    model, _ = several()
    save_adapters(model, tmp_path)
    other, state = adapted(CONFIGS["LORA"]["copy"](), "mine")
    load_all(other, tmp_path)
    assert list(state.records) == ["mine", *ORDER]
    assert state.active == ("mid", "zebra", "alpha")


def test_a_folder_that_peft_wrote_has_no_manifest(tmp_path):
    model, _ = several()
    save_adapters(model, tmp_path)
    (tmp_path / "inlay.json").unlink()
    assert read_manifest(tmp_path) == Manifest(
        {"default": "", "alpha": "alpha", "mid": "mid", "zebra": "zebra"}, ("default",)
    )
    load_all(net(), tmp_path)


def test_a_wrapper(tmp_path):
    """The same through ``PeftModel``, a mixed one, whose adapters may be of any methods."""
    model = inlay.get_peft_model(net(), CONFIGS["LORA"]["linear"](), "first", mixed=True)
    model.add_adapter("default", CONFIGS["LOHA"]["kinds"]())
    for name in ("first", "default"):
        shaken(model, name)
    model.set_adapter(["default", "first"])
    model.base_model.model.lin.scaling["first"] = 0.75
    save_adapters(model, tmp_path)
    again = inlay.PeftMixedModel.from_pretrained(net(), tmp_path, adapters="all")
    assert list(again.peft_config) == ["first", "default"]
    assert again.active_adapters == ["default", "first"]
    assert torch.equal(again(tokens()), model(tokens()))
    for name in ("first", "default"):
        assert_same(adapter_tensors(again, name), adapter_tensors(model, name))
    (tmp_path / "adapter_model.safetensors").unlink()
    fresh = net()
    with pytest.raises(CheckpointError, match="adapter_model"):
        inlay.PeftMixedModel.from_pretrained(fresh, tmp_path, adapters="all")
    assert find_state(fresh) is None
    assert_same(everything(fresh), everything(net()))


BAD = {
    "not json": "{",
    "format": {"format": "other"},
    "version": {"version": 2},
    "adapters": {"adapters": {"default": ""}},
    "escaping": {"adapters": [{"name": "../up", "folder": "../up"}]},
    "folder": {"adapters": [{"name": "a", "folder": "../up"}]},
    "twice": {"adapters": [{"name": "a", "folder": "a"}, {"name": "a", "folder": "a"}]},
    "options": {"adapters": [{"name": "a", "folder": "a", "options": {"lin": 3}}]},
    "active": {"active": ["nobody"]},
    "active twice": {"active": ["zebra", "zebra"]},
    "enabled": {"enabled": "yes"},
}


@pytest.mark.parametrize("how", BAD)
def test_bad_manifests(tmp_path, how):
    model, _ = several()
    save_adapters(model, tmp_path)
    path = tmp_path / "inlay.json"
    change = BAD[how]
    path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))
    fresh = net()
    with pytest.raises(CheckpointError, match=r"inlay\.json"):
        load_all(fresh, tmp_path)
    assert find_state(fresh) is None


def test_numbers_of_a_layer_that_is_not_there(tmp_path):
    model, _ = several()
    save_adapters(model, tmp_path)
    path = tmp_path / "inlay.json"
    path.write_text(path.read_text().replace('"lin"', '"line"', 1))
    fresh = net()
    with pytest.raises(CheckpointMismatchError, match=r"'line'.*'lin'"):
        load_all(fresh, tmp_path)
    assert find_state(fresh) is None
    assert_same(everything(fresh), everything(net()))
