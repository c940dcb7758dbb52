"""L4: saving and loading gives equal keys, tensors and outputs, over dicts and over files."""

from __future__ import annotations

from pathlib import Path

import torch
from cells import Cell
from subject import Subject, assert_bitwise, tensors_of

from inlay.checkpoint import (
    get_peft_model_state_dict,
    load_adapter_files,
    load_all,
    save_adapters,
    set_peft_model_state_dict,
)
from inlay.core.active import set_active
from inlay.core.inject import inject
from inlay.core.plan import plan
from inlay.core.state import find_state


def test_state_dict_into_an_adapter_of_another_name(cell: Cell) -> None:
    """The twin starts with other values, under another name and seed, and ends with the same output, bitwise."""
    subject = Subject(cell)
    saved = get_peft_model_state_dict(subject.model, adapter_name="one")
    assert saved
    assert not any(".one" in key for key in saved)
    twin = cell.model()
    inject(plan(twin, cell.config(), "other"), seed=99)
    loaded = set_peft_model_state_dict(twin, saved, adapter_name="other")
    assert not loaded.missing_keys
    assert not loaded.unexpected_keys
    again = get_peft_model_state_dict(twin, adapter_name="other")
    assert list(again) == list(saved)
    assert_bitwise(again, saved)
    assert torch.equal(twin(subject.x), subject.model(subject.x))


def test_saved_is_all_that_trains(cell: Cell) -> None:
    """Every parameter that gets a gradient is in the checkpoint, so nothing that was learned is lost."""
    subject = Subject(cell)
    saved = get_peft_model_state_dict(subject.model, adapter_name="one")
    trained = [p for name, p in subject.model.named_parameters() if p.requires_grad]
    pointers = {tensor.data_ptr() for tensor in saved.values()}
    assert trained
    assert all(p.data_ptr() in pointers for p in trained)


def test_files(cell: Cell, tmp_path: Path) -> None:
    """Two adapters of different methods through one folder: configs, tensors, order and outputs come back."""
    subject = Subject(cell)
    subject.add("two")
    subject.activate("two", "one")
    save_adapters(subject.model, tmp_path)
    config, tensors = load_adapter_files(tmp_path / "one")
    assert_bitwise(tensors, get_peft_model_state_dict(subject.model, adapter_name="one"))
    assert type(config) is type(cell.config())
    twin = cell.model()
    load_all(twin, tmp_path)
    state = find_state(twin)
    assert state is not None
    assert state.active == ("two", "one")
    before, after = tensors_of(subject.model), tensors_of(twin)
    assert before.keys() == after.keys()
    adapters = {n: t for n, t in before.items() if ".one" in n or ".two" in n}
    assert adapters
    assert_bitwise({n: after[n] for n in adapters}, adapters)
    for names in (("two", "one"), ("one",)):
        subject.activate(*names)
        set_active(state, names)
        assert torch.equal(twin(subject.x), subject.model(subject.x))
