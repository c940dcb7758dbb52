"""Loading and saving adapters. The floor is reading the file: ``safetensors.torch.load_file``."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, Figures, Run, Target, at_least, at_most, fresh_process, row, standalone
from benchmarks.memory import empty_caches
from benchmarks.models import give_values, llama

FLOOR = "safetensors.torch.load_file of the adapter's file"
WIDE = {"hidden": 64, "inner": 128}

INJECTING = "what is left is putting modules in, and making and reading two tensors for each"


def adapter_file(layers: int, hidden: int, inner: int) -> Path:
    """Save a LoRA r16 of all linear layers of a Llama, and return the folder; it goes when the process ends."""
    import inlay

    folder = Path(tempfile.mkdtemp(prefix="inlay-benchmark-"))
    _folders.append(folder)
    model = inlay.get_peft_model(llama(layers, hidden, inner), inlay.LoraConfig(r=16, target_modules="all-linear"))
    give_values(model)
    model.save_pretrained(folder)
    return folder


class _Folders(list[Path]):
    """Folders that go when the process ends, also one that ends without Python's own way out."""

    def clear_all(self) -> None:
        while self:
            shutil.rmtree(self.pop(), ignore_errors=True)


_folders = _Folders()


def reading(folder: Path) -> Any:
    from safetensors.torch import load_file

    path = os.fspath(folder / "adapter_model.safetensors")
    return lambda: load_file(path)


def first_load(run: Run, layers: int, hidden: int, inner: int) -> Figures:
    folder = adapter_file(layers, hidden, inner)
    actions: dict[str, Any] = {"floor": reading(folder)}
    for name, library in run.libraries().items():
        actions[name] = (
            lambda: llama(layers, hidden, inner),
            lambda model, library=library: library.PeftModel.from_pretrained(model, folder),
        )
    try:
        return run.alternate(actions, rounds=3 if run.quick else 7).figures("peft / inlay", "inlay / floor")
    finally:
        _folders.clear_all()


from_pretrained = row(
    "from_pretrained, 224 modules",
    what="PeftModel.from_pretrained of a LoRA r16 onto a Llama of 32 layers, all linear layers",
    floor=FLOOR,
    targets=(at_least(10, of="peft / inlay"), at_most(None, 3, of="inlay / floor")),
    full={"layers": 32, **WIDE},
    quick={"layers": 8},
)(first_load)

load_504 = row(
    "load 504 modules",
    what="the same onto a Llama of 72 layers",
    floor=FLOOR,
    targets=(at_least(10, of="peft / inlay"), at_most(None, 3, of="inlay / floor")),
    full={"layers": 72, **WIDE},
    quick={"layers": 12},
)(first_load)


@row(
    "20th load_adapter, 224 modules",
    what="load_adapter with 19 adapters loaded, LoRA r16 on a Llama of 32 layers, all linear layers",
    floor=FLOOR,
    targets=(at_least(50, of="peft / inlay", reason=INJECTING), at_most(None, 3, of="inlay / floor")),
    full={"layers": 32, **WIDE},
    quick={"layers": 2},
)
def twentieth_load(run: Run, layers: int, hidden: int, inner: int) -> Figures:
    folder = adapter_file(layers, hidden, inner)
    actions: dict[str, Any] = {"floor": reading(folder)}
    for name, library in run.libraries().items():
        model = library.PeftModel.from_pretrained(llama(layers, hidden, inner), folder, adapter_name="a1")
        for number in range(2, 20):
            model.load_adapter(folder, f"a{number}")

        def room(model: Any = model) -> Any:
            if "a20" in model.peft_config:
                model.delete_adapter("a20")
            return model

        actions[name] = (room, lambda model: model.load_adapter(folder, "a20"))
    try:
        return run.alternate(actions, rounds=3 if run.quick else 9).figures("peft / inlay", "inlay / floor")
    finally:
        _folders.clear_all()


def flat_load(run: Run, layers: int, many: int, hidden: int, inner: int) -> Figures:
    import inlay

    folder = adapter_file(layers, hidden, inner)
    actions: dict[str, Any] = {}
    for name, number in (("inlay, one", 1), ("inlay, many", many)):
        model = inlay.PeftModel.from_pretrained(llama(layers, hidden, inner), folder, adapter_name="a1")
        for i in range(2, number + 1):
            model.load_adapter(folder, f"a{i}")

        def room(model: Any = model) -> Any:
            if "new" in model.peft_config:
                model.delete_adapter("new")
            empty_caches()
            return model

        actions[name] = (room, lambda model: model.load_adapter(folder, "new"))
    gc.collect()
    gc.freeze()  # the collector would look through all of it in each round
    try:
        return run.alternate(actions).figures("inlay, many / inlay, one")
    finally:
        gc.unfreeze()
        _folders.clear_all()


def flat(number: int, target: Target) -> Any:
    return row(
        f"load_adapter, {number:,} loaded over 1 loaded",
        what=f"load_adapter with {number:,} adapters loaded, over the same with one; LoRA r16 on a Llama of 2 layers; "
        "the processor's caches are emptied before each",
        targets=(target,),
        full={"layers": 2, "many": number, **WIDE},
        quick={"many": 50},
        slow=number > 1000,
    )(flat_load)


flat_1000 = flat(1000, at_most(1.5, of="inlay, many / inlay, one"))
flat_10000 = flat(10_000, at_most(None, 1.5, of="inlay, many / inlay, one"))


@row(
    "save 504 modules",
    what="save_pretrained of a LoRA r16 on a Llama of 72 layers, all linear layers, into a new folder",
    floor="safetensors.torch.save_file of the same tensors",
    targets=(at_least(3, of="peft / inlay"),),
    full={"layers": 72, **WIDE},
    quick={"layers": 12},
)
def save_504(run: Run, layers: int, hidden: int, inner: int) -> Figures:
    from safetensors.torch import save_file

    folder = adapter_file(layers, hidden, inner)
    tensors = reading(folder)()

    def fresh() -> Path:
        place = Path(tempfile.mkdtemp(prefix="inlay-benchmark-"))
        _folders.append(place)
        return place

    actions: dict[str, Any] = {
        "floor": (fresh, lambda place: save_file(tensors, place / "x.safetensors", metadata={"format": "pt"}))
    }
    for name, library in run.libraries().items():
        model = library.PeftModel.from_pretrained(llama(layers, hidden, inner), folder)
        actions[name] = (fresh, lambda place, model=model: model.save_pretrained(place))
    try:
        return run.alternate(actions).figures("peft / inlay", "inlay / floor")
    finally:
        _folders.clear_all()


# What a load adds to the resident memory of a fresh process, at its peak; what the imports need is there before.
_PEAK = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch, {library}
from safetensors import safe_open
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.device("meta"):
            self.layers = nn.ModuleList(nn.Linear({width}, {width}, bias=False) for _ in range({layers}))
        for layer in self.layers:
            layer.weight = nn.Parameter(torch.empty(1, 1).expand({width}, {width}), requires_grad=False)
    def forward(self, x):
        return x
def peak():
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024
small, large = sys.argv[1:]
{library}.PeftModel.from_pretrained(Net(), small)  # what is imported late
model = Net()
open("/proc/self/clear_refs", "w").write("5")
before = peak()
held = {library}.PeftModel.from_pretrained(model, large)
print(json.dumps(peak() - before))
"""


@row(
    "peak memory of a load, over the adapter",
    what="peak resident memory that from_pretrained adds in a fresh process, over the bytes of the adapter",
    targets=(at_most(1.05, of="inlay"),),
    full={"layers": 16, "width": 4096, "rank": 256},
    quick={"rank": 128},
)
def peak_load(run: Run, layers: int, width: int, rank: int) -> Figures:
    import torch
    from torch import nn

    import inlay

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.device("meta"):
                self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    folders = []
    for r in (1, rank):
        config = inlay.LoraConfig(r=r, target_modules=r"layers\.\d+")
        model = inlay.get_peft_model(Net(), config, low_cpu_mem_usage=True)
        tensors = {
            key: torch.rand(target.shape).mul_(0.01) for key, target in inlay.checkpoint.adapter_slots(model).items()
        }
        folder = Path(tempfile.mkdtemp(prefix="inlay-benchmark-"))
        _folders.append(folder)
        model.peft_config["default"].save_pretrained(folder)
        from safetensors.torch import save_file

        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        folders.append(os.fspath(folder))
        del tensors
    gc.collect()
    figures = {"adapter": Figure(size, unit="B")}
    try:
        for library in run.libraries():
            code = _PEAK.format(library=library, width=width, layers=layers)
            figures[library] = Figure(fresh_process(code, *folders) / size)
        return figures
    finally:
        _folders.clear_all()


if __name__ == "__main__":
    standalone(__spec__.name)
