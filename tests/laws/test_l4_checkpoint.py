"""L4: saving and loading gives equal keys, tensors and outputs, over dicts and over files."""

from __future__ import annotations

from pathlib import Path

import torch
from cells import Cell, method_of
from subject import Subject, assert_bitwise, assert_close, tensors_of

from inlay.checkpoint import (
    get_peft_model_state_dict,
    load_adapter_files,
    load_all,
    save_adapters,
)
from inlay.core.active import set_active
from inlay.core.state import find_state
from inlay.testing.laws import keeping


def test_state_dict_into_an_adapter_of_another_name(cell: Cell) -> None:
    keeping.state_dict_into_an_adapter_of_another_name(cell)


def test_saved_is_all_that_trains(cell: Cell) -> None:
    keeping.saved_is_all_that_trains(cell)


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
        set_active(state, names, trainable=True)  # where nothing trains, products are made in another order
        found, expected = twin(subject.x), subject.model(subject.x)
        if method_of(cell.method).own_backward:  # what is kept for backward may be kept in one of them alone
            assert_close(found, expected, cell.dtype, size=subject.largest())
        else:
            assert torch.equal(found, expected)
