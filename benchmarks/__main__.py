"""Inlay beside peft: import, injection, a training step, merging, saving and loading. Run on an idle machine.

    python -m benchmarks            everything
    python -m benchmarks step merge some of it

Both libraries run in one process with one thread, in alternation; a figure is the median of several ratios of process
CPU time. "floor" is the same model without any adapter (frozen, with gradients through activations only).
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any


def cpu_seconds(action: Callable[[], object]) -> float:
    gc.collect()
    start = time.process_time()
    action()
    return time.process_time() - start


def alternate(actions: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run the actions in turn, so that a slow moment of the machine hits them all; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            spent = action()
            if turn:
                seconds[name].append(spent)
    return seconds


def report(what: str, seconds: dict[str, list[float]], over: str) -> None:
    """Print every row as a ratio to the row ``over``, the median of the rounds."""
    for name, values in seconds.items():
        ratios = [value / base for value, base in zip(values, seconds[over], strict=True)]
        low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
        print(f"{what:34} {name:14} {statistics.median(values):9.4f} s   {middle:7.2f} x {over} ({low:.2f}-{high:.2f})")


def llama(layers: int, hidden: int, inner: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=128,
    )
    return LlamaForCausalLM(config)


def libraries() -> dict[str, Any]:
    import peft

    import inlay

    return {"inlay": inlay, "peft": peft}


def bench_import() -> None:
    def load(statement: str) -> Callable[[], float]:
        code = f"import time; s = time.process_time(); {statement}; print(time.process_time() - s)"
        return lambda: float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)

    statements = {"torch": "import torch", "inlay": "import torch, inlay", "peft": "import torch, peft"}
    report("import", alternate({name: load(code) for name, code in statements.items()}, 5), "torch")


def bench_inject() -> None:
    actions = {}
    for name, library in libraries().items():

        def inject(library: Any = library) -> float:
            model = llama(40, 64, 128)
            config = library.LoraConfig(r=16, target_modules="all-linear")
            return cpu_seconds(lambda: library.get_peft_model(model, config))

        actions[name] = inject
    report("inject LoRA r16, 280 modules", alternate(actions, 5), "inlay")


def bench_step() -> None:
    import torch

    for dtype, rank, dropout in ((torch.float32, 8, 0.0), (torch.bfloat16, 16, 0.0), (torch.bfloat16, 16, 0.1)):
        base = llama(1, 1024, 2816).to(dtype).requires_grad_(False)
        models = {"floor": base.model.layers[0]}
        for name, library in libraries().items():
            wrapped = library.get_peft_model(
                _copy(base), library.LoraConfig(r=rank, target_modules="all-linear", lora_dropout=dropout)
            )
            models[name] = wrapped.base_model.model.model.layers[0]
        x = torch.randn(4, 128, 1024, dtype=dtype, requires_grad=True)
        position = base.model.rotary_emb(x, torch.arange(128)[None])

        def step(layer: Any, x: Any = x, position: Any = position) -> float:
            layer.train()

            def run() -> None:
                out = layer(x, position_embeddings=position)
                (out[0] if isinstance(out, tuple) else out).sum().backward()

            return cpu_seconds(run)

        actions = {name: (lambda layer=layer: step(layer)) for name, layer in models.items()}
        report(f"step {str(dtype)[6:]} r{rank} p={dropout}, 512 tokens", alternate(actions, 9), "floor")


def _copy(model: Any) -> Any:
    import copy

    return copy.deepcopy(model)


def bench_merge() -> None:
    import torch
    from torch import nn

    for dtype in (torch.float32, torch.bfloat16):
        actions = {}
        for name, library in libraries().items():

            def merge(library: Any = library, dtype: Any = dtype) -> float:
                base = nn.ModuleDict({"lin": nn.Linear(4096, 4096, bias=False, dtype=dtype)})
                config = library.LoraConfig(r=16, target_modules=["lin"], init_lora_weights=False)
                model = library.get_peft_model(base, config)
                return cpu_seconds(lambda: model.merge_and_unload())

            actions[name] = merge
        report(f"merge_and_unload {str(dtype)[6:]} 4096x4096", alternate(actions, 5), "inlay")


def bench_files() -> None:
    saves: dict[str, Callable[[], float]] = {}
    loads: dict[str, Callable[[], float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, library in libraries().items():
            model = library.get_peft_model(llama(40, 64, 128), library.LoraConfig(target_modules="all-linear"))
            where = f"{folder}/{name}"
            saves[name] = lambda model=model, where=where: cpu_seconds(lambda: model.save_pretrained(where))

            def load(library: Any = library, where: str = where) -> float:
                fresh = llama(40, 64, 128)
                return cpu_seconds(lambda: library.PeftModel.from_pretrained(fresh, where))

            loads[name] = load
        report("save 280 modules", alternate(saves, 5), "inlay")
        report("from_pretrained 280 modules", alternate(loads, 5), "inlay")


PARTS: dict[str, Callable[[], None]] = {
    "import": bench_import,
    "inject": bench_inject,
    "step": bench_step,
    "merge": bench_merge,
    "files": bench_files,
}


def main(names: list[str]) -> int:
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(PARTS)}", file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(1)
    for name in names or PARTS:
        PARTS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
