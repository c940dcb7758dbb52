"""One batch whose samples ask for different adapters: four linear layers of 1024, rank 16, 32 samples."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Action, Figures, Run, at_most, row, standalone

SAMPLES = 32


class Layers(nn.Module):
    """Linear layers one after the other."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(library: Any, base: nn.Module, adapters: int, rank: int) -> Any:
    """A copy of the base with adapters ``a0``, ``a1`` ... of random values."""
    config = library.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    model = library.get_peft_model(copy.deepcopy(base), config, adapter_name="a0")
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", config)
    return model


def names(adapters: int) -> list[str]:
    """The adapter of each sample: as many samples for each, in random order."""
    wanted = [f"a{i % adapters}" for i in range(SAMPLES)]
    random.Random(0).shuffle(wanted)
    return wanted


def forward(model: nn.Module, x: Tensor, **keywords: Any) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return model(x, **keywords)

    return run


def repeated(model: Any, x: Tensor, wanted: list[str], times: int) -> Callable[[], object]:
    """Forwards under one choice of adapters, as in generation: what the choice costs is paid once."""
    import inlay

    def run() -> None:
        with torch.no_grad(), inlay.call(model, adapters=wanted):
            for _ in range(times):
                model(x)

    return run


def mixed(run: Run, width: int, tokens: int, adapters: int, rounds: int, repeat: int) -> Figures:
    torch.manual_seed(0)
    base = Layers(4, width).requires_grad_(False).eval()
    x = torch.randn(SAMPLES, tokens, width)
    wanted = names(adapters)
    actions: dict[str, Action] = {"floor": forward(base, x)}
    for name, library in run.libraries().items():
        model = adapted(library, base, adapters, 16).eval()
        actions[name] = forward(model, x, adapter_names=wanted)
        if name == "inlay":
            once = repeated(model, x, wanted, 16)
    timings = run.alternate(actions, rounds, repeat)
    figures = timings.figures("inlay / floor", "peft / inlay", "peft / floor")

    def floors() -> None:
        for _ in range(16):
            actions["floor"]()

    generation = run.alternate({"floor": floors, "inlay": once}, max(rounds // 2, 2), max(repeat // 16, 1))
    figures["inlay / floor, 16 forwards of one choice"] = generation.over("inlay", "floor")
    return figures


ROWS = (
    "Products of a few rows for each adapter run far below the speed of the base product, and so does reading factors "
    "that are used once; bare loops without any library need 1.2, 1.3 and 1.9 times the base product here."
)


def mixed_row(adapters: int, tokens: int, gate: float | None, goal: float | None, reason: str = ROWS) -> Any:
    of = "token" if tokens == 1 else "tokens"
    return row(
        f"mixed batch, {adapters} adapters, {tokens} {of} a sample",
        what=f"forward of {SAMPLES} samples, each with one of {adapters} adapters; finding their rows and stacking "
        "factors included",
        floor="the same batch without adapters",
        targets=(at_most(gate, goal, reason=reason),),
        full={"width": 1024, "tokens": tokens, "adapters": adapters, "rounds": 15, "repeat": 16 if tokens == 1 else 1},
        quick={"rounds": 3, "repeat": 4 if tokens == 1 else 1},
        slow=tokens > 1,
    )(mixed)


two = mixed_row(2, 1, 1.3, 1.15)
eight = mixed_row(8, 1, 1.5, 1.25)
many = mixed_row(32, 1, 2.3, 1.5)
two_long = mixed_row(2, 32, 1.3, 1.15)
eight_long = mixed_row(8, 32, 1.5, 1.25)
many_long = mixed_row(32, 32, 2.3, 1.5)


def step(model: nn.Module, x: Tensor, **keywords: Any) -> Callable[[], object]:
    def run() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        x.grad = None
        model(x, **keywords).sum().backward()

    return run


@row(
    "mixed batch with gradients, 8 adapters",
    what=f"forward and backward of {SAMPLES} samples of 32 tokens, each with one of 8 adapters that all train",
    floor="the same batch, all of it with one adapter that trains",
    targets=(at_most(1.4, 1.2),),
    full={"width": 1024, "tokens": 32, "adapters": 8, "rounds": 9},
    quick={"rounds": 3},
)
def training(run: Run, width: int, tokens: int, adapters: int, rounds: int) -> Figures:
    import inlay

    torch.manual_seed(0)
    base = Layers(4, width).requires_grad_(False)
    x = torch.randn(SAMPLES, tokens, width, requires_grad=True)
    one = adapted(inlay, base, 1, 16)
    all_of_them = adapted(inlay, base, adapters, 16)
    for name, parameter in all_of_them.named_parameters():
        parameter.requires_grad_("lora_" in name)
    actions = {"floor": step(one, x), "inlay": step(all_of_them, x, adapter_names=names(adapters))}
    actions["base"] = step(base, x)
    return run.alternate(actions, rounds).figures("inlay / floor", "floor / base", "inlay / base")


if __name__ == "__main__":
    standalone(__spec__.name)
