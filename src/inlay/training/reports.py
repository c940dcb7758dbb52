"""What a run leaves to read: metrics.jsonl, loss.png, and the callback that feeds them and the display."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from inlay.errors import StateError

if TYPE_CHECKING:
    from inlay.training.display import Display
    from inlay.training.trainer import AdapterTrainer

# Trainer's name -> ours; anything else that is a number and starts with `eval_` is kept as it is.
NAMES = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm"}
TIMINGS = ("_runtime", "_per_second", "_preparation_time")


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line with ``step``, written to disk line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(entry) + "\n")

    def cut_after(self, step: int) -> int:
        """Drop what a killed run wrote after the checkpoint at ``step``, a half-written last line included.

        Returns:
            The number of tokens that had been trained on at ``step``.
        """
        if not self.path.is_file():
            return 0
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= step]
        fresh = self.path.with_suffix(".jsonl.new")
        fresh.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        os.replace(fresh, self.path)
        return max((entry["tokens"] for entry in kept if "tokens" in entry), default=0)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a metrics file."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # the line that was being written when the process died


class Reporter(TrainerCallback):
    """Sends each logging step and evaluation to the metrics file and the display, and stops on a loss of NaN."""

    def __init__(self, metrics: MetricsFile, display: Display, passes_per_step: float) -> None:
        self.metrics, self.display, self.passes_per_step = metrics, display, passes_per_step
        self.trainer: AdapterTrainer | None = None  # set once it exists: it is built with its callbacks
        self.tokens_before = 0  # trained on before this session
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()
        if state.is_world_process_zero:
            self.display.begin(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if control.should_save:
            # A checkpoint starts a new average of the loss, so that a resumed run logs the same figures.
            control.should_log = True
        if state.is_world_process_zero:
            self.display.step(state.global_step)
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "train_runtime" in logs:
            return
        entry: dict[str, Any] = {"step": state.global_step, "epoch": round(state.global_step * self.passes_per_step, 4)}
        entry.update({ours: _plain(logs[theirs]) for theirs, ours in NAMES.items() if theirs in logs})
        entry.update({k: _plain(v) for k, v in logs.items() if k.startswith("eval_") and not k.endswith(TIMINGS)})
        if "loss" in entry and self.trainer is not None:
            elapsed = max(time.perf_counter() - self._began, 1e-9)
            tokens = self.trainer.tokens_seen * args.world_size  # processes see batches of about the same length
            entry["tokens"] = self.tokens_before + tokens
            entry["tokens_per_second"] = round(tokens / elapsed, 1)
            entry["seconds"] = round(elapsed, 3)
        if state.is_world_process_zero:
            self.metrics.write(
                {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in entry.items()}
            )
            self.display.log(entry)
        for name in ("loss", "eval_loss"):
            if name in entry and not math.isfinite(entry[name]):
                raise StateError(
                    f"{name} became {entry[name]} by step {state.global_step}: training stopped. Checkpoints before "
                    "it are untouched; try a lower --lr, more --warmup-steps or --precision fp32"
                )


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def draw_losses(metrics: Path, target: Path, main_metric: str) -> None:
    """Write a PNG of the training loss, the evaluation loss and the task's main figure over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = list(read_metrics(metrics))

    def curve(name: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[name]) for entry in entries if isinstance(entry.get(name), (int, float))]
        return [step for step, _ in points], [value for _, value in points]

    figure, axes = pyplot.subplots(figsize=(7.0, 4.0), dpi=120)
    axes.plot(*curve("loss"), label="training loss", color="tab:blue")
    axes.plot(*curve("eval_loss"), label="evaluation loss", color="tab:orange", marker="o", markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    handles, names = axes.get_legend_handles_labels()
    steps, values = curve(f"eval_{main_metric}")
    if values:
        other = axes.twinx()
        other.plot(steps, values, label=main_metric, color="tab:green", linestyle="--", marker="s", markersize=4)
        other.set_ylabel(main_metric)
        more, labels = other.get_legend_handles_labels()
        handles, names = handles + more, names + labels
    axes.legend(handles, names, loc="center right")
    figure.tight_layout()
    figure.savefig(target)
    pyplot.close(figure)
