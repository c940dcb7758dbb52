"""Decoding one token at a time.

Batch 1 is where the time of Python and of small operators shows.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Figure, Figures, Run, at_most, row, standalone
from benchmarks.models import give_values, llama


def prefilled(model: nn.Module, prompt: int) -> Any:
    """A cache of ``prompt`` tokens."""
    with torch.no_grad():
        return model(torch.arange(prompt)[None] % 100, use_cache=True).past_key_values


def decoder(model: nn.Module, tokens: int) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """(a copy of a filled cache, decode so many tokens with it)."""
    cache, token = prefilled(model, 32), torch.tensor([[7]])

    def decode(own: Any) -> None:
        with torch.no_grad():
            for _ in range(tokens):
                model(token, past_key_values=own, use_cache=True)

    return lambda: copy.deepcopy(cache), decode


def adapted(library: Any, base: nn.Module) -> Any:
    model = library.get_peft_model(copy.deepcopy(base), library.LoraConfig(r=16, target_modules="all-linear"))
    give_values(model)
    return model.eval()


def merged(model: Any) -> Any:
    """The model with its adapter merged, still wrapped: it can be unmerged."""
    model.merge_adapter()
    return model


def python_calls(model: nn.Module) -> int:
    """Calls of Python functions in decoding one token."""
    count = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    prepare, decode = decoder(model, 1)
    decode(prepare())
    given = prepare()
    sys.setprofile(see)
    try:
        decode(given)
    finally:
        sys.setprofile(None)
    return count


def decode(run: Run, layers: int, hidden: int, inner: int, merge: bool, tokens: int, rounds: int) -> Figures:
    torch.manual_seed(0)
    base = llama(layers, hidden, inner).eval()
    models = {"floor": base}
    for name, library in run.libraries().items():
        models[name] = merged(adapted(library, base)) if merge else adapted(library, base)
    timings = run.alternate({name: decoder(model, tokens) for name, model in models.items()}, rounds)
    figures = timings.figures("inlay / floor", "peft / inlay", "peft / floor")
    floor = python_calls(base)
    for name in run.libraries():
        added = (timings.median(name).value - timings.median("floor").value) / (tokens * 7 * layers)
        figures[f"time added a layer, {name}"] = Figure(added, unit="s")
        figures[f"Python calls added a layer, {name}"] = Figure(
            (python_calls(models[name]) - floor) / (7 * layers), unit=""
        )
    return figures


def decoding(name: str, what: str, layers: int, hidden: int, inner: int, merge: bool, *targets: Any) -> Any:
    return row(
        name,
        what=f"one token, batch 1, fp32, Llama of {layers} layers, hidden {hidden}, LoRA r16 on all linear; {what}",
        floor="the model without adapters",
        targets=targets,
        full={"layers": layers, "hidden": hidden, "inner": inner, "merge": merge, "tokens": 8, "rounds": 25},
        quick={"rounds": 5, "tokens": 4},
    )(decode)


HOST = (
    "The three products of a layer written by hand, without a check, already cost 1.09 times the base here; seeing "
    "what changed between two calls adds two thirds of that, most of it for objects that are in no cache."
)
NOISE = "Fewer Python calls are made than without the wrapper; the spread is larger than what is missing."
launch_bound = decoding("decode, launch-bound", "not merged", 8, 256, 704, False, at_most(1.20, 1.10, reason=HOST))
wide = decoding("decode, hidden 1024", "not merged", 2, 1024, 2816, False, at_most(None))
# A call of nn.Module is three of Python's; the base layer's own are in the floor.
merged_target = (at_most(1.02, reason=NOISE), at_most(None, 3, of="Python calls added a layer, inlay"))
merged_launch_bound = decoding(
    "decode, merged but wrapped, launch-bound", "merged, still wrapped", 8, 256, 704, True, *merged_target
)
merged_wide = decoding(
    "decode, merged but wrapped, hidden 1024", "merged, still wrapped", 2, 1024, 2816, True, *merged_target
)

if __name__ == "__main__":
    standalone(__spec__.name)
