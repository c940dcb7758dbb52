"""Bytes kept for the backward pass.

They are counted beyond those of the frozen layer, twice: the storages that autograd saves, and, as "allocated", what
the allocator gave out in the forward pass and did not get back. "least" is what LoRA has to keep: each distinct input
that the frozen layer does not keep, the rank-wide products, and one bit for each element of a dropout mask.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

from benchmarks.block import Block
from benchmarks.harness import Figure, Figures, Run, at_least, at_most, row, standalone
from benchmarks.memory import allocated_bytes, kept_for_backward

WHAT = "storages that autograd saves in the forward pass of a Llama layer, each once, parameters and buffers excluded"
FLOOR = "what the frozen layer saves"
SIZES = {"hidden": 1024, "inner": 2816, "tokens": 512}


def least_bytes(block: Block, rank: int, dropout: float) -> int:
    """What LoRA has to keep beyond the frozen layer: the rank-wide products, a bit for each mask element, new inputs.

    Seven layers have four inputs: of q/k/v, of o, of gate/up and of down. The frozen layer keeps the second already,
    as the output of its attention, and none of the others: a norm keeps its own input, and the product of gate and up
    its factors. With dropout each layer draws its own mask.
    """
    tokens, item = block.x[..., 0].numel(), block.x.element_size()
    linears = {name.rpartition(".")[2]: m for name, m in block.base.named_modules() if isinstance(m, nn.Linear)}
    linears.pop("lm_head")
    distinct = sum(linears[name].in_features for name in ("q_proj", "gate_proj", "down_proj"))
    products = rank * len(linears)
    masks = sum(module.in_features for module in linears.values()) / 8 if dropout else 0
    return int(tokens * ((distinct + products) * item + masks))


def kept(run: Run, dtype: str, rank: int, dropout: float, hidden: int, inner: int, tokens: int) -> Figures:
    block = Block.make(getattr(torch, dtype), hidden, inner, tokens)
    models = block.variants(run, r=rank, lora_alpha=rank, lora_dropout=dropout)
    saved = {name: saved_bytes(block, model) for name, model in models.items()}
    left = {name: left_bytes(block, model) for name, model in models.items()}
    floor, floor_left = saved.pop("floor"), left.pop("floor")
    figures = {"floor": Figure(floor, unit="B")}
    for name, value in saved.items():
        figures[f"{name} - floor"] = Figure(value - floor, unit="B")
        figures[f"{name} - floor, allocated"] = Figure(left[name] - floor_left, unit="B")
    least = least_bytes(block, rank, dropout)
    figures["least"] = Figure(least, unit="B")
    figures["inlay / least"] = Figure((saved["inlay"] - floor) / least)
    if run.against_peft:
        for peft in [name for name in saved if name.startswith("peft")]:
            figures[f"{peft} / inlay"] = Figure((saved[peft] - floor) / (saved["inlay"] - floor))
            figures[f"{peft} / least"] = Figure((saved[peft] - floor) / least)
    return figures


def saved_bytes(block: Block, model: nn.Module) -> int:
    layer = block.layer(model)
    block.forward(layer)  # what is made once and cached is no cost of a step
    return kept_for_backward(lambda: block.forward(layer), [*model.parameters(), *model.buffers()])


def left_bytes(block: Block, model: nn.Module) -> int:
    """The same by another count: what the allocator gave out and did not get back, saved through autograd or not."""
    layer = block.layer(model)
    gc.collect()
    return allocated_bytes(lambda: block.forward(layer))[1]


def bytes_row(dtype: str, rank: int, dropout: float, *targets: Any) -> Any:
    return row(
        f"bytes kept for backward, LoRA {dtype} r{rank}, p = {dropout:g}",
        what=WHAT,
        floor=FLOOR,
        targets=targets,
        full={"dtype": dtype, "rank": rank, "dropout": dropout, **SIZES},
        quick={"hidden": 256, "inner": 704, "tokens": 128},
    )(kept)


BYTES = "A mask keeps a byte an element, because unpacking bits costs a CPU more than the products that they are for."
bf16 = bytes_row("bfloat16", 16, 0.0, at_least(3.5), at_most(None, 1.0, of="inlay / least"))
bf16_dropout = bytes_row("bfloat16", 16, 0.1, at_least(3.5), at_most(None, 1.0, of="inlay / least", reason=BYTES))
fp32 = bytes_row("float32", 8, 0.0, at_most(None, 1.0, of="inlay / least"))
fp32_dropout = bytes_row("float32", 8, 0.1, at_most(None, 1.0, of="inlay / least", reason=BYTES))

if __name__ == "__main__":
    standalone(__spec__.name)
