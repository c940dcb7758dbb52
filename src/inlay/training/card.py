"""The model card of a trained adapter, written from the figures of its run."""

from __future__ import annotations

from pathlib import Path

import yaml

from inlay.training.output import METRICS, PLOT, SETTINGS
from inlay.training.run import Outcome
from inlay.training.settings import RunConfig
from inlay.training.tasks import Task


def write_card(path: Path, config: RunConfig, task: Task, outcome: Outcome) -> None:
    """Write ``README.md``: front matter for the hub, results, how to load, and every setting that was not default."""
    local = Path(config.model).exists()
    name = Path(config.model).name if local else config.model
    front = {
        "base_model": name,
        "library_name": "peft",
        "pipeline_tag": task.pipeline_tag,
        "tags": [f"base_model:adapter:{name}", config.method, "inlay", "transformers"],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {outcome.folder.name}",
        "",
        f"A `{config.method}` adapter for `{name}`, trained for `{task.name}` with `inlay train`.",
        "",
        f"- {outcome.trainable:,} trainable parameters beside {outcome.parameters:,} frozen ones "
        f"({outcome.trainable / max(outcome.parameters, 1):.2%}); {outcome.adapter_bytes:,} bytes on disk",
        f"- {outcome.examples:,} training examples, {outcome.held_out:,} held out; {outcome.steps:,} steps",
        "",
    ]
    lines += _results(outcome)
    labels = task.labels()
    if labels is not None:
        lines += ["## Labels", "", *(f"{index}. `{label}`" for index, label in enumerate(labels)), ""]
    lines += ["## Use", "", "```python", *_usage(task, config.model if not local else name), "```", ""]
    lines += [
        f"Settings are in `{SETTINGS}`, figures over time in `{METRICS}` and `{PLOT}`.",
        "",
        f"![loss]({PLOT})",
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")


def _results(outcome: Outcome) -> list[str]:
    if not outcome.last:
        return []
    names = [key for key in outcome.last if key.startswith("eval_")]
    rows = ["| held-out figure | before | after |", "|---|---|---|"]
    for key in names:
        before = f"{outcome.first[key]:.4g}" if key in outcome.first else "-"
        rows.append(f"| {key.removeprefix('eval_')} | {before} | {outcome.last[key]:.4g} |")
    return ["## Results", "", *rows, ""]


def _usage(task: Task, name: str) -> list[str]:
    labels = task.labels()
    head = f", num_labels={len(labels)}" if labels is not None else ""
    return [
        f"from transformers import {task.auto_class}",
        "from inlay import PeftModel",
        "",
        f'base = {task.auto_class}.from_pretrained("{name}"{head})',
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")',
    ]
