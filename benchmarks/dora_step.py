"""A training step of DoRA, over the same library's LoRA."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.block import Block, errors, exact, gradients
from benchmarks.harness import Figure, Figures, Run, at_least, at_most, row, standalone
from benchmarks.kept_bytes import saved_bytes


def step(run: Run, dropout: float, hidden: int, inner: int, tokens: int, rounds: int) -> Figures:
    block = Block.make(torch.bfloat16, hidden, inner, tokens)
    config = {"r": 16, "lora_alpha": 16, "lora_dropout": dropout}
    models = block.variants(run, **config, use_dora=True)
    for name, library in run.libraries().items():
        models[f"{name} LoRA"] = block.adapted(library, **config)
    timed = ["floor", *run.libraries(), *(f"{name} LoRA" for name in run.libraries())]
    layers = {name: block.layer(models[name]) for name in timed}
    timings = run.alternate({name: lambda layer=layer: block.step(layer) for name, layer in layers.items()}, rounds)
    figures = timings.figures("inlay / floor", "peft / inlay", "peft / floor")
    for name in run.libraries():
        figures[f"{name} / own LoRA"] = timings.over(name, f"{name} LoRA")
    kept = {name: saved_bytes(block, models[name]) for name in ("floor", *run.libraries())}
    for name in run.libraries():
        figures[f"bytes kept, {name} - floor"] = Figure(kept[name] - kept["floor"], unit="B")
    if run.against_peft:
        figures["bytes kept, peft / inlay"] = Figure((kept["peft"] - kept["floor"]) / (kept["inlay"] - kept["floor"]))
    if dropout == 0:
        right = exact(block, models["inlay"], 1.0, dora=True)
        for name in models:
            if name != "floor" and not name.endswith("LoRA"):
                output, gradient = errors(gradients(block, models[name]), right)
                figures[f"error of the output, {name}"] = Figure(output, unit="rel")
                figures[f"error of the gradients, {name}"] = Figure(gradient, unit="rel")
    return figures


def dora(dropout: float, gate: float) -> Any:
    return row(
        f"DoRA step bfloat16 r16, p = {dropout:g}",
        what="forward and backward of a Llama layer with DoRA on its 7 linear layers, 512 tokens, over its LoRA",
        floor="the frozen layer with gradients through activations only",
        targets=(
            at_most(gate, 1.08, of="inlay / own LoRA"),
            at_least(5, of="bytes kept, peft / inlay"),
        ),
        full={"dropout": dropout, "hidden": 1024, "inner": 2816, "tokens": 512, "rounds": 5},
        quick={"hidden": 512, "inner": 1408, "tokens": 128, "rounds": 3},
    )(step)


plain = dora(0.0, 1.15)
with_dropout = dora(0.1, 1.25)

if __name__ == "__main__":
    standalone(__spec__.name)
