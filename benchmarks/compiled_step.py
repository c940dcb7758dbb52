"""Compiled: a training step, and what is compiled again when adapters change."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.block import Block
from benchmarks.harness import Figure, Figures, Run, at_most, row, standalone

NARROW = (
    "Compiled or not, the narrow products of a layer are the same library calls, which read input and gradients again; "
    "here they cost 4 to 6 % of the two base products, and what else there is was not measured on its own."
)


def compiled(layer: nn.Module, backend: str = "inductor") -> Callable[..., Any]:
    import torch._dynamo
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # no pool of processes beside the measured one
    torch._dynamo.config.cache_size_limit = 64
    return torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)


def compiled_step(
    run: Run, dtype: str, rank: int, hidden: int, inner: int, tokens: int, rounds: int, mlp: bool = False
) -> Figures:
    block = Block.make(getattr(torch, dtype), hidden, inner, tokens)
    models = {"floor": block.base.train()}
    for name, library in run.libraries().items():
        if name == "inlay" or not run.quick:  # compiling a layer takes a quarter of a minute
            models[name] = block.adapted(library, r=rank, lora_alpha=rank)
        if name == "inlay" and not run.quick:
            models["inlay prepared"] = block.adapted(library, r=rank, lora_alpha=rank)
            library.prepare_for_compile(models["inlay prepared"], max_rank=rank)
    layers: dict[str, Any] = {name: block.layer(model) for name, model in models.items()}
    if mlp:  # compiles in a third of the time
        layers = {name: layer.mlp for name, layer in layers.items()}
    actions = {}
    for name, layer in layers.items():
        actions[name] = stepping(block, compiled(layer), mlp)
        actions[f"{name} eager"] = stepping(block, layer, mlp)
    return run.alternate(actions, rounds).figures(
        "inlay / floor",
        *(["inlay prepared / floor"] if "inlay prepared" in actions else []),
        "peft / inlay",
        "peft / floor",
        "inlay eager / floor eager",
        "floor eager / floor",
    )


def lora(dtype: str, rank: int, **quick: Any) -> Any:
    return row(
        f"compiled LoRA step {dtype} r{rank}, p = 0",
        what="forward and backward of a Llama layer under torch.compile, LoRA on its 7 linear layers, 512 tokens; "
        "prepared: after prepare_for_compile, with one slot of this rank",
        floor="the frozen layer compiled, with gradients through activations only",
        targets=(at_most(1.20, 1.10, reason=NARROW), at_most(1.20, 1.10, of="inlay prepared / floor", reason=NARROW)),
        full={"dtype": dtype, "rank": rank, "hidden": 1024, "inner": 2816, "tokens": 512, "rounds": 15},
        quick=quick,
        slow=not quick,
    )(compiled_step)


def stepping(block: Block, layer: Callable[..., Any], mlp: bool) -> Callable[[], None]:
    return (lambda: layer(block.x).sum().backward()) if mlp else (lambda: block.step(layer))


bf16_r16 = lora("bfloat16", 16, hidden=512, inner=1408, tokens=128, rounds=3, mlp=True)
fp32_r8 = lora("float32", 8)


class Recompilations:
    """A layer compiled without code generation, whose graphs are counted; each call runs forward once."""

    def __init__(self, block: Block, model: Any) -> None:
        import torch._dynamo

        torch._dynamo.reset()
        self.block, self.layer = block, compiled(block.layer(model), backend="eager")
        self.seen = self.graphs()

    def graphs(self) -> int:
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def run(self, times: int = 1) -> int:
        """The number of graphs that were new since the last call."""
        for _ in range(times):
            self.block.forward(self.layer)
        before, self.seen = self.seen, self.graphs()
        return self.seen - before


def two_adapters(library: Any, block: Block, rank: int) -> Any:
    model = block.adapted(library, r=rank, lora_alpha=rank)
    model.add_adapter("other", library.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    return model


@row(
    "graphs compiled for active sets",
    what="torch.compile(fullgraph=True) of a Llama layer with two adapters; graphs over visits of both, twice",
    targets=(
        at_most(2, of="graphs for two active sets, inlay"),
        at_most(0, of="graphs on a return to a visited set, inlay"),
    ),
    full={"hidden": 64, "inner": 128, "tokens": 128},
)
def active_sets(run: Run, hidden: int, inner: int, tokens: int) -> Figures:
    block, figures = Block.make(torch.float32, hidden, inner, tokens), {}
    for name, library in run.libraries().items():
        model = two_adapters(library, block, 8)
        count = Recompilations(block, model)
        new = []
        for adapter in ("default", "other", "default", "other"):
            model.set_adapter(adapter)
            new.append(count.run())
        figures[f"graphs for two active sets, {name}"] = Figure(sum(new[:2]), unit="")
        figures[f"graphs on a return to a visited set, {name}"] = Figure(sum(new[2:]), unit="")
    return figures


@row(
    "recompilations after preparing",
    what="graphs compiled anew when the adapter, its scale or its tensors (a hot swap, of another rank) change",
    targets=tuple(
        at_most(0, of=f"new graphs on {change}, inlay") for change in ("a switch", "a change of scale", "a hot swap")
    ),
    full={"hidden": 64, "inner": 128, "tokens": 128},
)
def after_preparing(run: Run, hidden: int, inner: int, tokens: int) -> Figures:
    block, figures = Block.make(torch.float32, hidden, inner, tokens), {}
    for name, library in run.libraries().items():
        model = two_adapters(library, block, 8)
        if hasattr(library, "prepare_for_compile"):
            library.prepare_for_compile(model, slots=1, max_rank=8)
        else:
            swapping(library).prepare_model_for_compiled_hotswap(model, target_rank=8)
        count = Recompilations(block, model)
        count.run(2)
        for change, act in changes(library, block, model).items():
            act()
            figures[f"new graphs on {change}, {name}"] = Figure(count.run(2), unit="")
    return figures


def swapping(library: Any) -> Any:
    if library.__name__ == "inlay":
        import inlay.checkpoint.hotswap as module
    else:
        import peft.utils.hotswap as module
    return module


def changes(library: Any, block: Block, model: Any) -> dict[str, Callable[[], None]]:
    def rescale() -> None:
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("other", 0.5)

    def swap() -> None:
        config = library.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear")
        with tempfile.TemporaryDirectory() as folder:
            library.get_peft_model(copy.deepcopy(block.base), config).save_pretrained(folder)
            swapping(library).hotswap_adapter(model, folder, "other", torch_device="cpu")

    return {"a switch": lambda: model.set_adapter("other"), "a change of scale": rescale, "a hot swap": swap}


if __name__ == "__main__":
    standalone(__spec__.name)
