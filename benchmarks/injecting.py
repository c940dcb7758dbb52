"""Putting adapters into models: of many layers, without memory, with thousands of experts, and one after another.

peft takes seconds to minutes for a mixture of experts, and its time for a second adapter grows with the square of the
number of layers, so it is measured on models of a few blocks and its time is extrapolated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Figure, Figures, Run, at_least, at_most, cpu_seconds, row, standalone
from benchmarks.models import llama

FLOOR = "constructing two nn.Linear of rank 16 for each adapted layer"
RANK = 16
SHAPES = {"8B": (32, 4096, 14336, 32), "70B": (80, 8192, 28672, 64)}
EXPERTS = 128

FLAT = (
    "no part stands out any more: drawing values and allocating take a third, planning, hanging tensors and adapting a "
    "quarter each"
)
COLD = "each adapter's modules are further apart in memory than the last one's"


def config(library: Any) -> Any:
    return library.LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=True)


def pairs(model: Any, device: str = "cpu") -> Callable[[], object]:
    """What constructs two linear layers for each that is adapted."""
    from torch import nn

    head = getattr(model, "lm_head", None)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    shapes = [(layer.in_features, layer.out_features) for layer in layers]

    def construct() -> object:
        return [
            (nn.Linear(i, RANK, bias=False, device=device), nn.Linear(RANK, o, bias=False, device=device))
            for i, o in shapes
        ]

    return construct


def first(library: Any, low: bool = False) -> Callable[[Any], object]:
    given = config(library)
    return lambda model: library.get_peft_model(model, given, low_cpu_mem_usage=low)


@row(
    "inject, 560 modules",
    what="get_peft_model with LoRA r16 on every linear layer of a Llama of 80 layers (hidden 64)",
    floor=FLOOR,
    targets=(at_least(15, reason=FLAT), at_most(1.0, 0.7, reason=FLAT)),
    full={"layers": 80, "rounds": 21},
    quick={"layers": 20, "rounds": 3},
)
def eighty_layers(run: Run, layers: int, rounds: int) -> Figures:
    make = functools.partial(llama, layers, 64, 128)
    actions: dict[str, Any] = {"floor": pairs(make())}
    actions |= {name: (make, first(library)) for name, library in run.libraries().items()}
    timings = run.alternate(actions, rounds)
    figures = timings.figures("inlay / floor", "peft / inlay", "peft / floor")
    small = cpu_seconds((lambda: llama(layers // 4, 64, 128), first(run.libraries()["inlay"])))
    figures["inlay, 4 times the layers"] = Figure(timings.median("inlay").value / small)
    return figures


def on_meta(size: str, low: bool) -> Any:
    @row(
        f"inject, {size} on meta{', low_cpu_mem_usage' if low else ''}",
        what=f"get_peft_model with LoRA r16 on every linear layer of a Llama of {size} on the meta device",
        floor=f"{FLOOR}, on the meta device",
        targets=(at_least(15, reason=FLAT), at_most(1.0, 0.7, reason=FLAT)),
        full={"rounds": 3},
        quick={"rounds": 1},
        slow=size == "70B" and not low,
    )
    def measure(run: Run, rounds: int) -> Figures:
        import torch

        def make() -> Any:
            with torch.device("meta"):
                return llama(*SHAPES[size])

        actions: dict[str, Any] = {"floor": pairs(make(), "meta")}
        actions |= {name: (make, first(library, low)) for name, library in run.libraries().items()}
        return run.alternate(actions, rounds).figures("inlay / floor", "peft / inlay", "peft / floor")

    return measure


meta_8b = on_meta("8B", False)
meta_8b_low = on_meta("8B", True)
meta_70b = on_meta("70B", False)
meta_70b_low = on_meta("70B", True)


def experts(blocks: int, hidden: int = 32) -> Any:
    """Decoder blocks whose experts are modules with three linear layers each, 388 linear layers a block."""
    from torch import nn

    def linears(**names: tuple[int, int]) -> Any:
        return nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in names.items()})

    def block() -> Any:
        square = (hidden, hidden)
        attention = linears(q_proj=square, k_proj=square, v_proj=square, o_proj=square)
        parts = [linears(gate_proj=square, up_proj=square, down_proj=square) for _ in range(EXPERTS)]
        return nn.ModuleDict({"self_attn": attention, "norm": nn.LayerNorm(hidden), "experts": nn.ModuleList(parts)})

    model: Any = nn.Module()
    model.embed_tokens = nn.Embedding(8, hidden)
    model.layers = nn.ModuleList(block() for _ in range(blocks))
    return model


def seconds(action: Any, rounds: int) -> float:
    """The least time of several, which the machine's other work disturbs least."""
    return min(cpu_seconds(action) for _ in range(rounds))


@row(
    "inject, 18,624 modules of experts",
    what="first and second LoRA r16 on every linear layer of 48 blocks of 128 experts; peft extrapolated from few",
    floor=FLOOR,
    targets=(
        at_least(15, of="peft, first / inlay, first"),
        at_least(100, of="peft, second / inlay, second"),
        at_most(1.0, 0.7, of="inlay, first / floor", reason=FLAT),
        at_most(1.0, 0.7, of="inlay, second / floor", reason=FLAT),
        at_most(4.5, of="inlay, first, 4 times the blocks"),
        at_most(4.5, of="inlay, second, 4 times the blocks"),
    ),
    full={"blocks": 48, "rounds": 3, "few": (1, 2)},
    quick={"blocks": 4, "rounds": 1},
)
def mixture(run: Run, blocks: int, rounds: int, few: tuple[int, int]) -> Figures:
    libraries = run.libraries()
    inlay = libraries["inlay"]

    def second(library: Any) -> Any:
        made = functools.partial(library.get_peft_model)
        return lambda n: (
            lambda: made(experts(n), config(library)),
            lambda model: model.add_adapter("second", config(library)),
        )

    floor = seconds(pairs(experts(blocks)), rounds)
    ours = {n: seconds((lambda n=n: experts(n), first(inlay)), rounds) for n in (blocks // 4, blocks)}
    again = {n: seconds(second(inlay)(n), rounds) for n in (blocks // 4, blocks)}
    figures = {
        "inlay, first / floor": Figure(ours[blocks] / floor),
        "inlay, second / floor": Figure(again[blocks] / floor),
        "inlay, first, 4 times the blocks": Figure(ours[blocks] / ours[blocks // 4]),
        "inlay, second, 4 times the blocks": Figure(again[blocks] / again[blocks // 4]),
        "floor": Figure(floor, unit="s"),
        "inlay, first": Figure(ours[blocks], unit="s"),
        "inlay, second": Figure(again[blocks], unit="s"),
    }
    if "peft" in libraries:
        peft = libraries["peft"]
        low, high = few
        line = {n: seconds((lambda n=n: experts(n), first(peft)), 1) for n in few}
        figures["peft, first"] = Figure(line[high] / high * blocks, unit="s")
        curve = {n: seconds(second(peft)(n), 1) for n in few}
        # seconds = a n + b n^2, through both points
        bend = max(0.0, (curve[high] / high - curve[low] / low) / (high - low))
        slope = curve[low] / low - bend * low
        figures["peft, second"] = Figure(slope * blocks + bend * blocks**2, unit="s")
        for turn, times in (("first", ours), ("second", again)):
            figures[f"peft, {turn} / inlay, {turn}"] = Figure(figures[f"peft, {turn}"].value / times[blocks])
    return figures


@row(
    "20th adapter",
    what="add_adapter of LoRA r16 on 224 modules (32 layers) that have 1 and that have 19 adapters",
    floor=FLOOR,
    targets=(at_least(50, reason=FLAT), at_most(1.1, of="inlay, 20th / 2nd", reason=COLD)),
    full={"layers": 32},
    quick={"layers": 4},
)
def twentieth(run: Run, layers: int) -> Figures:
    figures: Figures = {}
    floor = seconds(pairs(llama(layers, 64, 128)), 3)
    figures["floor"] = Figure(floor, unit="s")
    for name, library in run.libraries().items():
        model = library.get_peft_model(llama(layers, 64, 128), config(library))
        times = {}
        for count in range(2, 21):
            add = functools.partial(model.add_adapter, f"a{count}", config(library))
            times[count] = cpu_seconds(add)
        figures[name] = Figure(times[20], unit="s")
        early, late = min(times[2], times[3], times[4]), min(times[18], times[19], times[20])
        figures[f"{name}, 20th / 2nd"] = Figure(late / early)
    figures["inlay / floor"] = Figure(figures["inlay"].value / floor)
    if "peft" in figures:
        figures["peft / inlay"] = Figure(figures["peft"].value / figures["inlay"].value)
    return figures


if __name__ == "__main__":
    standalone(__spec__.name)
