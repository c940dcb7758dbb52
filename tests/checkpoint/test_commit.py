"""A save that fails or is killed: the old files are there, or readers are told."""

from __future__ import annotations

import os

import pytest
import torch
from models_to_save import CONFIGS, adapted, assert_same, net, shaken

from inlay.checkpoint import adapter_tensors, load_all, load_peft_weights, save_adapters
from inlay.checkpoint.commit import Commit
from inlay.errors import CheckpointError


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def two(seed):
    model, _ = adapted(CONFIGS["LORA"]["linear"](), "default")
    adapted(CONFIGS["LORA"]["copy"](), "other", model)
    for name in ("default", "other"):
        shaken(model, name, seed)
    return model


class Killed(BaseException):
    """Stands for the end of the process: no handler runs file operations after it."""


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_move_that_fails_is_undone(tmp_path, monkeypatch, at, error):
    old = two(1)
    save_adapters(old, tmp_path)
    before = snapshot(tmp_path)
    assert len(before) == 6
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == at + 1:
            raise error("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(error):
        save_adapters(two(2), tmp_path)
    monkeypatch.undo()
    assert len(calls) >= at + 1
    assert snapshot(tmp_path) == before
    again = net()
    load_all(again, tmp_path)
    assert_same(adapter_tensors(again), adapter_tensors(old))


@pytest.mark.parametrize("at", range(6))
def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch, at):
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == at + 1:
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no"):
        save_adapters(two(1), tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_weights_come_before_configurations(tmp_path, monkeypatch):
    """So a reader never sees a new configuration with old weights, nor a folder that is no adapter yet."""
    real, order = os.replace, []
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(str(b.relative_to(tmp_path))), real(a, b)))
    save_adapters(two(1), tmp_path)
    assert order == [
        "adapter_model.safetensors",
        "adapter_config.json",
        "other/adapter_model.safetensors",
        "other/adapter_config.json",
        "README.md",
        "inlay.json",
    ]


@pytest.mark.parametrize("at", range(1, 6))
def test_a_killed_save_is_noticed(tmp_path, monkeypatch, at):
    """Nothing can be undone then: from some moment on every file operation fails."""
    save_adapters(two(1), tmp_path)
    real, calls = os.replace, []

    def dying(source, target):
        calls.append(target)
        if len(calls) > at:
            for name in ("replace", "unlink", "rmdir"):
                monkeypatch.setattr(os, name, lambda *a, **k: (_ for _ in ()).throw(Killed()))
            raise Killed
        real(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        save_adapters(two(2), tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.rglob("*.replaced"))
    with pytest.raises(CheckpointError, match="cut off"):
        load_all(net(), tmp_path)
    new = two(3)
    save_adapters(new, tmp_path)  # saving again cures it
    assert sorted(snapshot(tmp_path)) == sorted(
        [
            "adapter_model.safetensors",
            "adapter_config.json",
            "other/adapter_model.safetensors",
            "other/adapter_config.json",
            "README.md",
            "inlay.json",
        ]
    )
    again = net()
    load_all(again, tmp_path)
    assert_same(adapter_tensors(again, "other"), adapter_tensors(new, "other"))


def test_a_tensor_that_cannot_be_saved_changes_nothing(tmp_path):
    save_adapters(two(1), tmp_path)
    before = snapshot(tmp_path)
    broken = two(2)
    broken.lin.lora_A["other"].weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(CheckpointError, match=r"lin\.lora_A\.other\.weight.*\(2, 8\).*\(0,\)"):
        save_adapters(broken, tmp_path)
    assert snapshot(tmp_path) == before
    meta, _ = adapted(CONFIGS["LORA"]["linear"](), low_memory=True)
    with pytest.raises(CheckpointError, match="meta device"):
        save_adapters(meta, tmp_path)
    assert snapshot(tmp_path) == before


def test_a_configuration_that_cannot_be_written_changes_nothing(tmp_path):
    model, state = adapted(CONFIGS["LORA"]["linear"]())
    save_adapters(model, tmp_path)
    before = snapshot(tmp_path)
    state.records["default"].config.rank_pattern = {"lin": object()}
    with pytest.raises(ValueError, match="rank_pattern"):
        save_adapters(shaken(model), tmp_path)
    assert snapshot(tmp_path) == before


def test_the_other_format_does_not_stay_behind(tmp_path):
    """A reader prefers safetensors: an old file beside a new ``.bin`` would be read instead of it."""
    save_adapters(two(1), tmp_path)
    new = two(2)
    save_adapters(new, tmp_path, safe_serialization=False)
    assert not list(tmp_path.rglob("*.safetensors"))
    found = load_peft_weights(tmp_path)
    assert all(torch.equal(found[key], value) for key, value in adapter_tensors(new).items())


def test_only_the_main_process_writes(tmp_path):
    save_adapters(two(1), tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="folder to save into"):
        save_adapters(two(1), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_leaving_the_block_early_moves_nothing(tmp_path):
    (tmp_path / "a").write_text("old")

    def fail():
        with Commit() as commit:
            commit.stage_text(tmp_path / "a", "new")
            commit.stage_text(tmp_path / "deep" / "er" / "b", "new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert snapshot(tmp_path) == {"a": b"old"}
    assert not (tmp_path / "deep").exists()
