"""Registered adapters give what an ordinary load gives, whatever was in their slot before."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from stored_adapters import TARGETS, inputs, net, saved, store_of, wrapped

import inlay
from inlay.checkpoint import load_adapter_files
from inlay.errors import AdapterNameError, CheckpointMismatchError, ConfigError, StateError, UnknownAdapterError
from inlay.functional import set_adapter

KINDS = {
    "rank 2": {"r": 2},
    "rank 8": {"r": 8, "lora_alpha": 3},
    "one layer": {"r": 4, "target_modules": ["b"]},
    "rslora": {"r": 5, "use_rslora": True},
    "patterns": {"r": 3, "rank_pattern": {"a": 6}, "alpha_pattern": {"b": 1}},
    "dots.and/slashes": {"r": 1},
}


@pytest.fixture
def adapters(tmp_path):
    """Names with folder and outputs."""
    return {
        name: (tmp_path / str(i), saved(tmp_path / str(i), i + 1, **fields))
        for i, (name, fields) in enumerate(KINDS.items())
    }


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["bare", "wrapped", "beside its own"])
@pytest.mark.parametrize("source", ["folder", "memory"])
@torch.no_grad()
def test_each_gives_what_a_load_gives(adapters, form, source, tmp_path):
    model = net()
    if form == "wrapped":
        model = wrapped(model)
    elif form == "beside its own":
        model = inlay.PeftModel.from_pretrained(model, adapters["rank 2"][0], adapter_name="own")
    store = store_of(model)
    for name, (folder, _) in adapters.items():
        store.register(name, folder if source == "folder" else load_adapter_files(folder))
    close(model(inputs()), adapters["rank 2"][1] if form == "beside its own" else net()(inputs()))
    for name in [*adapters, *reversed(adapters)]:
        set_adapter(model, name)
        close(model(inputs()), adapters[name][1])
        if form != "bare":
            assert model.active_adapter == name
    assert len(store.resident) == 2
    assert store.copies == 2 * len(adapters) - 2  # the last two were there when the way back began
    if form == "beside its own":
        assert list(model.peft_config) == ["own"]  # slots are no adapters of the user's
        model.save_pretrained(tmp_path / "all")
        assert not list((tmp_path / "all").glob("slot*"))
        model.set_adapter("own")
        close(model(inputs()), adapters["rank 2"][1])


@torch.no_grad()
def test_samples_of_one_batch_use_several(adapters):
    model = wrapped(net())
    store = store_of(model)
    for name, (folder, _) in adapters.items():
        store.register(name, folder)
    wanted = [("rank 8", "__base__", "one layer"), ("patterns", "patterns", "rslora"), ("rank 2",) * 3]
    for names in wanted:
        for found in (model(inputs(), adapter_names=list(names)), _called(model, names)):
            for row, name in enumerate(names):
                right = net()(inputs()) if name == "__base__" else adapters[name][1]
                close(found[row], right[row])
    with pytest.raises(StateError, match="3 adapters are asked for"):
        model(inputs(), adapter_names=["rank 2", "rank 8", "patterns"])
    assert store.resident[-1] == "rank 2"  # nothing was evicted for a call that failed


def _called(model, names):
    with inlay.call(model, adapters=names):
        return model(inputs())


@torch.no_grad()
def test_the_one_not_used_for_the_longest_time_goes(adapters):
    store = store_of(model := net(), max_resident=3)
    for name, (folder, _) in adapters.items():
        store.register(name, folder)
    for name in ("rank 2", "rank 8", "one layer"):
        with inlay.call(model, adapters=[name]):
            pass
    with inlay.call(model, adapters=["rank 2"]):
        pass
    with inlay.call(model, adapters=["rslora"]):
        pass
    assert store.resident == ("one layer", "rank 2", "rslora")
    store.pin("one layer")
    set_adapter(model, "rank 2")
    with inlay.call(model, adapters=["patterns"]):
        pass
    assert set(store.resident) == {"one layer", "rank 2", "patterns"}
    with (
        inlay.call(model, adapters=["patterns"]),
        pytest.raises(StateError, match=r"'one layer' \(pinned\).*'rank 2' \(active\).*'patterns' \(in use"),
    ):
        store.pin("rank 8")
    store.unpin("one layer")
    store.evict("one layer")
    with pytest.raises(StateError, match="active"):
        store.unregister("rank 2")
    set_adapter(model, "patterns")
    close(model(inputs()), adapters["patterns"][1])


def test_what_was_trained_is_not_evicted(adapters):
    store = store_of(model := net(), max_resident=1)
    for name, (folder, _) in adapters.items():
        store.register(name, folder)
    set_adapter(model, "rank 8")
    parameter = next(p for n, p in model.named_parameters() if "lora_B.slot0" in n)
    with torch.no_grad():
        parameter.add_(1.0)
    set_adapter(model, [])
    with pytest.raises(StateError, match=r"'rank 8' \(changed since it was copied in\)"):
        set_adapter(model, "rank 2")
    store.unregister("rank 8")
    set_adapter(model, "rank 2")
    close(model(inputs()), adapters["rank 2"][1])


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"r": 9}, CheckpointMismatchError, "rank 9.*room for 8"),
        ({"r": 2, "target_modules": ["a", "b"], "bias": "all"}, ConfigError, "bias"),
        ({"r": 2, "use_dora": True}, ConfigError, "DoRA.*LoRA"),
        ({"r": 2, "modules_to_save": ["b"], "target_modules": ["a"]}, ConfigError, "modules_to_save"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("check", [True, False])
def test_what_does_not_fit_is_refused(tmp_path, fields, error, message, check):
    saved(tmp_path / "good", 1, r=2)
    saved(tmp_path / "bad", 2, **fields)
    store = store_of(model := net(), max_resident=1)
    store.register("good", tmp_path / "good")
    set_adapter(model, "good")
    before = model(inputs())
    set_adapter(model, [])
    if check:
        with pytest.raises(error, match=message):
            store.register("bad", tmp_path / "bad")
        assert "bad" not in store
    else:
        store.register("bad", tmp_path / "bad", check=False)
        with pytest.raises(error, match=message):
            set_adapter(model, "bad")
    assert store.resident == ("good",)
    set_adapter(model, "good")
    assert torch.equal(model(inputs()), before)


def test_other_layers_and_names_are_refused(tmp_path):
    saved(tmp_path / "both", 1, r=2)
    model = wrapped(net())
    store = inlay.AdapterStore(model, inlay.LoraConfig(r=4, target_modules=["a"]))
    with pytest.raises(CheckpointMismatchError, match=r"b\.lora_A.*belong to no layer"):
        store.register("x", tmp_path / "both")
    model = wrapped(net())
    store = store_of(model)
    store.register("x", tmp_path / "both")
    for taken in ("x", "slot0", "__base__", ""):
        with pytest.raises(AdapterNameError):
            store.register(taken, tmp_path / "both")
    for call in (model.set_adapter, store.pin, store.prefetch, store.evict, store.unregister):
        with pytest.raises(UnknownAdapterError, match="'y'"):
            call("y")
    with pytest.raises(UnknownAdapterError, match="slot0"):
        model.set_adapter("slot0")  # it may hold another adapter at any time
    for bad in ({"max_resident": 0}, {"max_host": -1}, {"fields": {"bias": "all"}}):
        with pytest.raises(ConfigError):
            store_of(fresh := net(), **bad)
        assert [*fresh.modules()]
        assert not hasattr(fresh, "peft_config")


@torch.no_grad()
def test_closing_gives_the_model_back(adapters):
    model = net()
    modules, names = [*model.modules()], [n for n, _ in model.named_parameters()]
    store = store_of(model)
    store.register("x", adapters["rank 2"][0])
    set_adapter(model, "x")
    store.close()
    assert [*model.modules()] == modules
    assert [n for n, _ in model.named_parameters()] == names
    close(model(inputs()), net()(inputs()))


@torch.no_grad()
def test_a_copy_of_the_model_stands_alone(adapters):
    store = store_of(model := net())
    for name, (folder, _) in adapters.items():
        store.register(name, folder)
    set_adapter(model, "rank 8")
    twin = copy.deepcopy(model)
    set_adapter(model, "rank 2")
    close(twin(inputs()), adapters["rank 8"][1])
    close(model(inputs()), adapters["rank 2"][1])


@torch.no_grad()
def test_ia3_slots(tmp_path):
    """Not only LoRA: what has no rank must have every layer."""

    def config(**fields):
        return inlay.IA3Config(target_modules=TARGETS, feedforward_modules=["b"], **fields)

    torch.manual_seed(3)
    model = inlay.get_peft_model(net(), config())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.normal_()
    model.save_pretrained(tmp_path)
    store = inlay.AdapterStore(bare := net(), config(), max_resident=1)
    store.register("x", tmp_path)
    set_adapter(bare, "x")
    close(bare(inputs()), model(inputs()))


def test_threads_share_the_slots(adapters):
    """More threads than slots, each with two adapters at a time: every forward uses its own."""
    model = wrapped(net())
    store = store_of(model, max_resident=3)
    for name, (folder, _) in adapters.items():
        store.register(name, folder)
    names, wrong = list(adapters), []

    def work(number: int) -> None:
        with torch.no_grad():
            for turn in range(12):
                mine = [names[(number + turn) % 6], names[(number + 2 * turn + 1) % 6], "__base__"]
                found = model(inputs(), adapter_names=mine)
                for row, name in enumerate(mine[:2]):
                    if not torch.allclose(found[row], adapters[name][1][row], rtol=1e-5, atol=1e-6):
                        wrong.append((number, turn, name))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
