"""What importing Inlay costs beside importing torch. Each import runs in a process of its own."""

from __future__ import annotations

import statistics

from benchmarks.harness import Figure, Figures, Run, at_most, fresh_process, row, standalone

CODE = """
import json, sys, time
start = time.process_time()
{what}
spent = time.process_time() - start
heavy = [name for name in ("accelerate", "huggingface_hub", "transformers") if name in sys.modules]
print(json.dumps([spent, heavy]))
"""
IMPORTS = {
    "torch": "import torch",
    "inlay": "import torch, inlay",
    "inlay in use": "import torch, inlay\ninlay.LoraConfig, inlay.get_peft_model, inlay.PeftModel",
    "peft": "import torch, peft",
}


@row(
    "import inlay",
    what='"inlay" imports torch and inlay, "inlay in use" also loads get_peft_model, PeftModel and LoraConfig',
    floor="import torch",
    targets=(
        at_most(1.05, 1.02, of="inlay / torch"),
        at_most(0, of="transformers, accelerate or huggingface_hub imported"),
    ),
    full={"rounds": 5},
    quick={"rounds": 1},
)
def importing(run: Run, rounds: int) -> Figures:
    wanted = {name: what for name, what in IMPORTS.items() if run.against_peft or name != "peft"}
    seconds: dict[str, list[float]] = {name: [] for name in wanted}
    heavy: set[str] = set()
    for _ in range(rounds):  # the files are in memory: this process has imported them all
        for name, what in wanted.items():
            spent, found = fresh_process(CODE.format(what=what))
            seconds[name].append(spent)
            if name.startswith("inlay"):
                heavy.update(found)
    figures = {}
    for name, base in (("inlay", "torch"), ("inlay in use", "torch"), ("peft", "torch"), ("peft", "inlay")):
        if name in seconds:
            ratios = [one / other for one, other in zip(seconds[name], seconds[base], strict=True)]
            figures[f"{name} / {base}"] = Figure(statistics.median(ratios), min(ratios), max(ratios))
    figures["transformers, accelerate or huggingface_hub imported"] = Figure(len(heavy), unit="")
    for name, values in seconds.items():
        figures[name] = Figure(statistics.median(values), min(values), max(values), "s")
    return figures


if __name__ == "__main__":
    standalone(__spec__.name)
