"""Registered adapters: switching among many, and bringing one into its slot."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.harness import Figure, Figures, Run, at_least, at_most, row, standalone
from benchmarks.models import give_values, llama

MODEL = {"layers": 32, "hidden": 64, "inner": 128}


@contextmanager
def folders(count: int, layers: int, hidden: int, inner: int) -> Iterator[list[Path]]:
    """Folders with a LoRA r16 of all linear layers each."""
    import inlay

    places = [Path(tempfile.mkdtemp(prefix="inlay-benchmark-")) for _ in range(count)]
    try:
        model = inlay.get_peft_model(llama(layers, hidden, inner), inlay.LoraConfig(r=16, target_modules="all-linear"))
        for seed, place in enumerate(places):
            give_values(model, seed)
            model.save_pretrained(place)
        yield places
    finally:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)


def stored(places: list[Path], names: int, layers: int, hidden: int, inner: int, **options: Any) -> tuple[Any, Any]:
    """A model with a store of 4 slots, and the store, with adapters registered under so many names."""
    import inlay
    from inlay.core.policy import INLAY

    model = inlay.PeftModel.around(llama(layers, hidden, inner).eval(), INLAY)
    config = inlay.LoraConfig(r=16, target_modules="all-linear")
    store = inlay.AdapterStore(model, config, max_resident=4, **options)
    for number in range(names):
        store.register(f"a{number}", places[number % len(places)], check=False)
    return model, store


@row(
    "set_adapter, 10,000 registered over 2",
    what="switching between two resident adapters, LoRA r16 on a Llama of 32 layers, all linear layers",
    targets=(at_most(1.2, of="inlay, many / inlay, two"),),
    full={"many": 10_000, **MODEL},
    quick={"layers": 4},
)
def switch(run: Run, many: int, layers: int, hidden: int, inner: int) -> Figures:
    shape = (layers, hidden, inner)
    with folders(2, *shape) as places:
        actions: dict[str, Any] = {}
        for name, number in (("inlay, two", 2), ("inlay, many", many)):
            model, _ = stored(places, number, *shape)
            turn = cycle(("a0", "a1"))
            actions[name] = lambda model=model, turn=turn: model.set_adapter(next(turn))
        return run.alternate(actions, repeat=20).figures("inlay, many / inlay, two")


@row(
    "an adapter that is not resident, 224 modules",
    what="set_adapter of a registered adapter that is in a file, in host memory, or read ahead",
    floor="safetensors.torch.load_file of the adapter's file",
    targets=(at_most(3, of="inlay, file / floor"), at_least(None, of="peft / inlay, file")),
    full=MODEL,
    quick={"layers": 4},
)
def swap(run: Run, layers: int, hidden: int, inner: int) -> Figures:
    from safetensors.torch import load_file

    shape = (layers, hidden, inner)
    with folders(6, *shape) as places:
        path = str(places[0] / "adapter_model.safetensors")
        actions: dict[str, Any] = {"floor": lambda: load_file(path)}
        for name, options in (("inlay, file", {}), ("inlay, host memory", {"max_host": 6})):
            model, _ = stored(places, 6, *shape, **options)
            turn = cycle(f"a{number}" for number in range(6))  # six names and four slots: never there
            actions[name] = lambda model=model, turn=turn: model.set_adapter(next(turn))
            for _ in range(6):
                actions[name]()
        if run.against_peft:
            import peft
            from peft.utils.hotswap import hotswap_adapter

            model = peft.PeftModel.from_pretrained(llama(*shape), places[0])
            actions["peft"] = lambda: hotswap_adapter(model, places[1], "default")
        return run.alternate(actions).figures("inlay, file / floor", "inlay, host memory / floor", "peft / inlay, file")


@row(
    "bytes of Python for a registered adapter",
    what="memory that registering one of 10,000 adapters adds, by tracemalloc",
    targets=(at_most(1000, of="inlay"),),
    full={"many": 10_000, **MODEL},
    quick={"layers": 4},
)
def registered_bytes(run: Run, many: int, layers: int, hidden: int, inner: int) -> Figures:
    import tracemalloc

    with folders(1, layers, hidden, inner) as places:
        _, store = stored(places, 1, layers, hidden, inner)
        names = [f"b{number}" for number in range(many)]
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for name in names:
            store.register(name, places[0], check=False)
        used = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
    return {"inlay": Figure(used / many, unit="B")}


if __name__ == "__main__":
    standalone(__spec__.name)
