"""What registering and using adapters costs, counted: modules, opened files, function calls, copies."""

from __future__ import annotations

import sys
from concurrent.futures import wait

import pytest
import torch
from call_counts import calls
from stored_adapters import inputs, net, saved, store_of
from torch.utils._python_dispatch import TorchDispatchMode

import inlay
from inlay.checkpoint import load_adapter_files
from inlay.errors import CheckpointError
from inlay.functional import set_adapter

_opened: list[str] | None = None


def _hook(event, arguments):
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_hook)  # cannot be taken away again, so it is quiet unless asked


class Opened:
    """The files below a folder that are opened inside the block, by name."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __enter__(self):
        global _opened
        _opened = self.names = []
        return self

    def __exit__(self, *error):
        global _opened
        _opened = None
        self.names[:] = [name.rpartition("/")[2] for name in self.names if name.startswith(self.folder)]


@pytest.fixture
def folders(tmp_path):
    for i in range(3):
        saved(tmp_path / str(i), i, r=2 + i)
    return tmp_path


BOTH = ["adapter_config.json", "adapter_model.safetensors"]


def test_a_file_is_opened_when_its_adapter_is_needed(folders):
    store = store_of(model := net(), max_resident=1)
    with Opened(folders) as unchecked:
        store.register("0", folders / "0", check=False)
    with Opened(folders) as checked:
        store.register("1", folders / "1")
    with Opened(folders) as used:
        set_adapter(model, "0")
    with Opened(folders) as again:
        set_adapter(model, "0")
        set_adapter(model, [])
        set_adapter(model, "0")
    assert unchecked.names == []
    assert again.names == []
    assert sorted(checked.names) == sorted(used.names) == BOTH


def test_host_memory_saves_reading(folders):
    store = store_of(model := net(), max_resident=1, max_host=2)
    for name in "012":
        store.register(name, folders / name)
    with Opened(folders) as first:
        for name in ("0", "1"):
            set_adapter(model, [])
            set_adapter(model, name)
    with Opened(folders) as second:
        for name in ("0", "1"):
            set_adapter(model, [])
            set_adapter(model, name)
    assert sorted(first.names) == sorted(BOTH * 2)
    assert second.names == []


def test_prefetched_adapters_are_not_read_again(folders):
    store = store_of(model := net(), max_resident=2)
    for name in "012":
        store.register(name, folders / name)
    store.prefetch(["0", "1"])
    wait(store._host.reads.values(), timeout=30)
    with Opened(folders) as used, inlay.call(model, adapters=["0", "1", "__base__"]):
        model(inputs())
    assert used.names == []
    assert store.copies == 2
    assert not store._host.reads  # nothing is kept beyond its use, because max_host is 0
    store.register("gone", folders / "gone", check=False)
    store.prefetch("gone")
    with pytest.raises(CheckpointError, match="gone"):
        set_adapter(model, "gone")


def test_registering_adds_nothing_to_the_model(folders):
    store = store_of(model := net())
    held = load_adapter_files(folders / "0")
    modules, tensors = len([*model.modules()]), [(n, p.data_ptr()) for n, p in model.named_parameters()]
    for i in range(50):
        store.register(f"memory {i}", held)
        store.register(f"file {i}", folders / "1", check=False)
        if i % 10 == 0:
            set_adapter(model, f"file {i}")
    assert len(store) == 100
    assert len([*model.modules()]) == modules
    assert [(n, p.data_ptr()) for n, p in model.named_parameters()] == tensors
    entries = {name for module in model.modules() for name in getattr(module, "entries", ())}
    assert entries == {"slot0", "slot1"}


def test_as_many_calls_at_5000_adapters_as_at_3(folders):
    def measured(number):
        store = store_of(model := net())
        for i in range(number):
            store.register(f"{i}", folders / f"{i % 3}", check=False)
        for name in "012":
            set_adapter(model, name)  # what is made once is made
        hit = calls(lambda: set_adapter(model, "1"))
        miss = calls(lambda: set_adapter(model, "0"))
        forward = calls(lambda: model(inputs()))
        return hit, miss, forward, calls(lambda: store.register("new", folders / "0"))

    few, many = measured(3), measured(5000)
    assert few == many
    assert few[0].total() < few[1].total()


class Operators(TorchDispatchMode):
    """The operators that run inside the block."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_swap_is_one_copy_of_all_tensors(folders):
    store = store_of(model := net(), max_resident=1)
    store.register("0", folders / "0")
    store.register("1", load_adapter_files(folders / "1"))
    set_adapter(model, "0")
    set_adapter(model, [])
    with Operators() as operators:
        set_adapter(model, "1")
    kinds = {name for name in operators.seen if name not in ("aten::slice", "aten::view", "aten::detach")}
    assert kinds == {"aten::_foreach_copy_", "aten::_foreach_zero_"}
    assert operators.seen.count("aten::_foreach_copy_") == 1


def test_precision_of_the_slots(folders):
    """Slots of a half-precision model are in float32, as loaded adapters are, unless it is said otherwise."""
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        store = store_of(model := net().bfloat16(), autocast_adapter_dtype=autocast)
        store.register("0", folders / "0")
        set_adapter(model, "0")
        plain = inlay.PeftModel.from_pretrained(
            net().bfloat16(), folders / "0", adapter_name="x", autocast_adapter_dtype=autocast
        )
        assert {p.dtype for n, p in model.named_parameters() if "slot" in n} == {dtype}
        x = inputs().bfloat16()
        torch.testing.assert_close(model(x), plain(x), rtol=1e-2, atol=1e-2)


def test_compiled_once_for_all_adapters(folders):
    """After ``prepare_for_compile`` neither a switch nor an eviction is a reason to compile again."""
    store = store_of(model := net(), max_resident=2)
    for name in "012":
        store.register(name, folders / name)
    inlay.prepare_for_compile(model, slots=1, max_rank=8)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        for name in "012" * 2:
            set_adapter(model, name)
            right = inlay.PeftModel.from_pretrained(net(), folders / name)(inputs())
            torch.testing.assert_close(compiled(inputs()), right, rtol=1e-5, atol=1e-6)
    assert graphs == 1
    assert store.copies == 6
