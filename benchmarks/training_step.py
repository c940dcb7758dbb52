"""A training step of LoRA.

Each variant is measured with its error against fp64: Inlay as it is, with products in the adapter's fp32 (the policy's
``compute="adapter"``, which is how peft computes), peft as it is, and peft with ``autocast_adapter_dtype=False``, whose
adapters are bf16. Without dropout the exact values are those of the layer with the weights W + s B A.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.block import Block, errors, exact, gradients
from benchmarks.harness import Figure, Figures, Run, Target, at_most, row, standalone

WHAT = "forward and backward of a Llama layer (hidden 1024, inner 2816), LoRA on its 7 linear layers, 512 tokens"
FLOOR = "the frozen layer with gradients through activations only"
FULL = {"hidden": 1024, "inner": 2816, "tokens": 512}
QUICK = {"hidden": 512, "inner": 1408, "tokens": 128, "rounds": 3}
RATIOS = (
    "inlay / floor",
    "peft / inlay",
    "peft / floor",
    "inlay fp32 products / floor",
    "peft bf16 adapters / floor",
    "peft bf16 adapters / inlay",
    "peft / inlay fp32 products",
)
# chance alone moves an error by some per cent
ERRORS = tuple(
    at_most(1.05, of=f"error of {what}, inlay / peft bf16 adapters") for what in ("the output", "the gradients")
)


def step(run: Run, dtype: str, rank: int, dropout: float, hidden: int, inner: int, tokens: int, rounds: int) -> Figures:
    block = Block.make(getattr(torch, dtype), hidden, inner, tokens)
    models = block.variants(run, r=rank, lora_alpha=rank, lora_dropout=dropout)
    layers = {name: block.layer(model) for name, model in models.items()}
    timings = run.alternate({name: lambda layer=layer: block.step(layer) for name, layer in layers.items()}, rounds)
    figures = timings.figures(*RATIOS[: None if dtype == "bfloat16" else 3])
    if dropout == 0:  # with dropout each library draws its own masks
        right = exact(block, models["inlay"], 1.0)
        figures.update(compared({n: errors(gradients(block, m), right) for n, m in models.items() if n != "floor"}))
    return figures


def compared(found: dict[str, tuple[float, float]]) -> Figures:
    """The relative errors against fp64 of each variant, and Inlay's over those of peft with adapters in bf16."""
    figures = {}
    for place, what in enumerate(("the output", "the gradients")):
        for name, pair in found.items():
            figures[f"error of {what}, {name}"] = Figure(pair[place], unit="rel")
        if "peft bf16 adapters" in found:
            ratio = found["inlay"][place] / found["peft bf16 adapters"][place]
            figures[f"error of {what}, inlay / peft bf16 adapters"] = Figure(ratio)
    return figures


def lora(dtype: str, rank: int, dropout: float, *targets: Target) -> Any:
    return row(
        f"LoRA step {dtype} r{rank}, p = {dropout:g}",
        what=WHAT,
        floor=FLOOR,
        targets=targets or (at_most(None),),
        full={"dtype": dtype, "rank": rank, "dropout": dropout, **FULL, "rounds": 7 if dtype == "bfloat16" else 31},
        quick=QUICK,
    )(step)


bf16_r16 = lora("bfloat16", 16, 0.0, at_most(1.20, 1.10), *ERRORS)
bf16_r16_dropout = lora("bfloat16", 16, 0.1, at_most(1.45, 1.25))
bf16_r64 = lora("bfloat16", 64, 0.0)
NARROW = (
    "The six narrow products of each layer, counted one by one, cost 4 to 6 % of the two base products on this CPU."
)
fp32_r8 = lora("float32", 8, 0.0, at_most(1.10, 1.05, reason=NARROW))
fp32_r8_dropout = lora("float32", 8, 0.1)
fp32_r16 = lora("float32", 16, 0.0)

if __name__ == "__main__":
    standalone(__spec__.name)
