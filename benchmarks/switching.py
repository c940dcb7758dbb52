"""Switching between adapters and deleting them, with few and with many of them in the model."""

from __future__ import annotations

import gc
from typing import Any

from benchmarks.harness import Figure, Figures, Run, at_least, at_most, cpu_seconds, row, standalone
from benchmarks.injecting import config
from benchmarks.memory import empty_caches
from benchmarks.models import llama

BOTH_WAYS = 5


def timed(library: Any, model: Any, adapters: int, rounds: int, cold: bool = False) -> tuple[float, float]:
    """Least seconds of a switch and of a deletion with that many adapters in the model.

    Args:
        cold: empty the processor's caches before each deletion, which a few adapters fit into and many do not.
    """
    held = library.get_peft_model(model, config(library), "a0")
    for number in range(1, adapters):
        held.add_adapter(f"a{number}", config(library))
    switches, deletions = [], []

    def back_and_forth() -> None:  # several times, for what ran before leaves the processor's caches cold
        for name in ("a1", "a0") * BOTH_WAYS:
            held.set_adapter(name)

    gc.collect()
    gc.freeze()  # the collector would look through all of it in each round
    try:
        for turn in range(rounds):
            switches.append(cpu_seconds(back_and_forth) / (2 * BOTH_WAYS))
            name = f"a{1 + turn % (adapters - 1)}"
            deletions.append(
                cpu_seconds((empty_caches if cold else lambda: None, lambda _, name=name: held.delete_adapter(name)))
            )
            held.add_adapter(name, config(library))
    finally:
        gc.unfreeze()
    return min(switches), min(deletions)


TWO_ADAPTERS = (
    "A switch sets requires_grad of each tensor of the two adapters, and asks before whether it is still where it was: "
    "two to three microseconds a layer; the time does not depend on the number of adapters."
)
FREEING = (
    "Half of what is left is freeing two modules and two tensors a layer, the other half taking them out of their "
    "containers."
)


@row(
    "set_adapter and delete_adapter, 20 adapters",
    what="LoRA r16 on 224 modules (32 layers), 20 adapters: switching between two, and deleting an inactive one",
    targets=(
        at_least(100, of="peft set_adapter / inlay", reason=TWO_ADAPTERS),
        at_least(50, of="peft delete_adapter / inlay", reason=FREEING),
    ),
    full={"layers": 32, "adapters": 20, "rounds": 5},
    quick={"layers": 4, "adapters": 20, "rounds": 2},
)
def twenty(run: Run, layers: int, adapters: int, rounds: int) -> Figures:
    found = {
        name: timed(library, llama(layers, 64, 128), adapters, rounds if name == "inlay" else 2)
        for name, library in run.libraries().items()
    }
    figures: Figures = {}
    for place, what in enumerate(("set_adapter", "delete_adapter")):
        for name, times in found.items():
            figures[f"{name} {what}"] = Figure(times[place], unit="s")
        if "peft" in found:
            figures[f"peft {what} / inlay"] = Figure(found["peft"][place] / found["inlay"][place])
    return figures


@row(
    "set_adapter and delete_adapter, 2 and many adapters",
    what="LoRA r16 on one block, the same operations with all of 10,000 adapters in the model (peft is left out); the "
    "processor's caches are emptied before each deletion",
    targets=(
        at_most(None, 1.2, of="set_adapter, many / 2"),
        at_most(None, 1.2, of="delete_adapter, many / 2"),
    ),
    full={"adapters": 10000, "rounds": 30},
    quick={"adapters": 200, "rounds": 30},
)
def many(run: Run, adapters: int, rounds: int) -> Figures:
    library = run.libraries()["inlay"]
    few = timed(library, llama(1, 64, 128), 2, rounds, cold=True)
    lots = timed(library, llama(1, 64, 128), adapters, rounds, cold=True)
    figures: Figures = {}
    for place, what in enumerate(("set_adapter", "delete_adapter")):
        figures[f"{what}, many / 2"] = Figure(lots[place] / few[place])
        figures[f"{what}, 2"] = Figure(few[place], unit="s")
        figures[f"{what}, many"] = Figure(lots[place], unit="s")
    return figures


if __name__ == "__main__":
    standalone(__spec__.name)
