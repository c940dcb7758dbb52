"""One training run from settings to adapter folder. Everything is checked before the first file is written."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inlay.errors import ConfigError, MissingExtraError
from inlay.training import output
from inlay.training.calibration import CHANGES_BASE, Calibration, measured_start
from inlay.training.display import Display
from inlay.training.formats import Layout, Row, check_files, read_rows
from inlay.training.methods import build_config, method_choice
from inlay.training.pretrained import (
    LABELS_FILE,
    WEIGHTS_FILE,
    length_limit,
    load_base,
    load_tokenizer,
    transformers_library,
)
from inlay.training.settings import RunConfig
from inlay.training.tasks import Encoded, Task, task_class


@dataclass
class Outcome:
    """What a run came to."""

    folder: Path
    model: Any  # the trained PeftModel, still in memory
    steps: int
    trainable: int
    parameters: int  # of the base model
    adapter_bytes: int
    examples: int
    held_out: int
    first: dict[str, float] = field(default_factory=dict)  # evaluation before the first step
    last: dict[str, float] = field(default_factory=dict)  # evaluation of the saved adapter
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Prepared:
    """All that training needs, in memory; nothing is on disk yet."""

    task: Task
    tokenizer: Any
    model: Any
    train: Encoded
    evaluation: Encoded | None
    notes: list[str]
    start: str | None = None  # the adapter's way to start, where it is one that is measured on data


def train(config: RunConfig, display: Display, resume: bool = False) -> Outcome:
    """Train an adapter as ``config`` says and leave it in ``config.output``.

    Raises:
        InlayError: anything wrong with settings, data, model or method, before a file is written; a loss that is
            not finite, afterwards.
    """
    _check_extras()
    folder = Path(config.output)
    _check_files(config)
    record = output.make_record(config, processes=int(os.environ.get("WORLD_SIZE", "1")))
    if resume:
        output.refuse_changed(folder, config, record)
    else:
        output.refuse_used(folder)
    prepared = prepare(config)

    import torch

    from inlay.training.callback import AdapterCallback
    from inlay.training.order import Examples, Pace, Passes
    from inlay.training.reports import MetricsFile, Reporter, draw_losses, read_metrics
    from inlay.training.trainer import AdapterTrainer, checkpoints, training_arguments

    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    examples = prepared.train.examples
    pace = Pace.of(config, len(examples), record["processes"])
    found = checkpoints(folder / output.CHECKPOINTS) if resume else []
    arguments = training_arguments(
        config,
        folder / output.CHECKPOINTS,
        pace=pace,
        evaluates=prepared.evaluation is not None,
        resumes=bool(found),
    )
    first_process = arguments.process_index == 0
    metrics = MetricsFile(folder / output.METRICS)
    reporter = Reporter(metrics, display, passes_per_step=pace.per_step / len(examples))
    if first_process:
        if not resume:
            output.begin(folder, config, record)
        reporter.tokens_before = metrics.cut_after(int(found[-1].name.rpartition("-")[2]) if found else -1)
        for note in prepared.notes:
            display.note(note)
        if resume:
            display.note(f"resuming from {found[-1]}" if found else "no checkpoint yet: starting at step 0")
    trainer = AdapterTrainer(
        prepared.model,
        prepared.task,
        prepared.tokenizer,
        arguments,
        Passes(examples, pace.steps * pace.per_step, config.seed),
        Examples(prepared.evaluation.examples) if prepared.evaluation is not None else None,
        keep=config.keep_checkpoints,
        callbacks=[reporter, AdapterCallback()],
    )
    reporter.trainer = trainer
    if prepared.start in CHANGES_BASE:
        trainer.keep_untrained()
    try:
        with warnings.catch_warnings():
            # checkpoints belong to the base as the start left it, which a resumed run measures again
            warnings.filterwarnings("ignore", message="adapter .* was trained over base weights")
            # about names that transformers will drop: nothing that whoever trains could do
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            trainer.train(resume_from_checkpoint=str(found[-1]) if found else None)
            entries = list(read_metrics(metrics.path))
            done = trainer.state.global_step
            if prepared.evaluation is not None and not any(e["step"] == done and "eval_loss" in e for e in entries):
                trainer.evaluate()
    finally:
        if first_process:
            display.end()

    trainer.save_model(str(folder))
    outcome = _describe(prepared, folder, trainer.state.global_step)
    if first_process:
        outcome.adapter_bytes = (folder / WEIGHTS_FILE).stat().st_size
        labels = prepared.task.labels()
        if labels is not None:
            output.write_json(folder / LABELS_FILE, {"labels": labels})
        evaluations = [entry for entry in read_metrics(metrics.path) if "eval_loss" in entry]
        if evaluations:
            outcome.first = evaluations[0] if evaluations[0]["step"] == 0 else {}
            outcome.last = evaluations[-1]
        draw_losses(metrics.path, folder / output.PLOT, prepared.task.main_metric)
        from inlay.training.card import write_card

        write_card(folder / output.CARD, config, prepared.task, outcome)
    trainer.accelerator.wait_for_everyone()
    if alone and torch.distributed.is_available() and torch.distributed.is_initialized():
        # made by the trainer; its threads must end before the process does, or C++ aborts it
        torch.distributed.destroy_process_group()
    return outcome


def prepare(config: RunConfig) -> Prepared:
    """Read and check data, tokenizer, model and adapter settings; writes nothing."""
    task_type = task_class(config.task)
    method_choice(config.method)
    task = task_type(config)
    layout = Layout(task.unit, config.text_field, config.label_field)
    rows = _rows(config.data, "data", layout, task)
    held = _rows(config.eval_data, "eval_data", layout, task) if config.eval_data else []
    task.fit(rows, held)
    adapter = build_config(
        config.method,
        task_type=task.task_type,
        target=config.target,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        init=config.init,
        extra=config.set,
    )
    start = measured_start(adapter)
    tokenizer = load_tokenizer(config.model)

    import inlay

    transformers_library().set_seed(config.seed)
    base = load_base(config.model, task.auto_class, tokenizer, **task.model_options())
    length = _length(config, task, base, tokenizer)
    train_part, evaluation = _encode(config, task, tokenizer, rows, held, length)
    notes = [f"{len(train_part.examples):,} training examples, {train_part.tokens:,} tokens"]
    if evaluation is not None:
        notes.append(f"{len(evaluation.examples):,} held-out examples, {evaluation.tokens:,} tokens")
    for part, what in ((train_part, "training"), (evaluation, "held-out")):
        if part is not None and part.cut:
            notes.append(f"{part.cut:,} {what} texts are longer than {length} tokens and were cut")
    base.config.use_cache = False
    if config.gradient_checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable()
        base.enable_input_require_grads()
    calibration = None if start is None else Calibration.of(config, task, tokenizer, train_part.examples, start)
    if calibration is not None:
        calibration.before(base, adapter)
        notes.append(f"{start} measures {calibration.examples:,} training examples")
    model = inlay.get_peft_model(base, adapter)
    if calibration is not None:
        calibration.after(model)
    return Prepared(task, tokenizer, model, train_part, evaluation, notes, start)


def _check_extras() -> None:
    """Raise MissingExtraError before any work when a part of ``inlay[train]`` is not installed."""
    from importlib.util import find_spec

    for name in ("transformers", "accelerate", "matplotlib"):
        if find_spec(name) is None:
            raise MissingExtraError(f"{name} is not installed: pip install 'inlay[train]'")


def _check_files(config: RunConfig) -> None:
    check_files(config.data, "data")
    check_files(config.eval_data, "eval_data")
    shared = set(config.data) & set(config.eval_data)
    if shared:
        raise ConfigError(f"eval_data: {sorted(shared)[0]!r} is training data as well")


def _rows(paths: list[str], setting: str, layout: Layout, task: Task) -> list[Row]:
    rows = list(read_rows(paths, setting, layout))
    if not rows:
        raise ConfigError(f"{setting}: no rows in {', '.join(paths)}")
    task.check(rows, setting)
    return rows


def _length(config: RunConfig, task: Task, base: Any, tokenizer: Any) -> int:
    limit = length_limit(base.config, tokenizer)
    if config.max_length is None:
        return min(task.default_length, limit or task.default_length)
    if limit is not None and config.max_length > limit:
        raise ConfigError(f"max_length is {config.max_length}, but the model reads at most {limit} tokens")
    return config.max_length


def _encode(
    config: RunConfig, task: Task, tokenizer: Any, rows: Sequence[Row], held: Sequence[Row], length: int
) -> tuple[Encoded, Encoded | None]:
    """Return the training part and the held-out part."""
    if held:
        return task.encode(rows, tokenizer, length), task.encode(held, tokenizer, length)
    if not config.eval_fraction:
        return task.encode(rows, tokenizer, length), None
    if len(rows) == 1:
        parts = task.split(task.encode(rows, tokenizer, length), config.eval_fraction)
        if parts is None:
            raise ConfigError(f"eval_fraction {config.eval_fraction}: {rows[0].where} is too short to split")
        return parts
    count = max(1, round(len(rows) * config.eval_fraction))
    if count >= len(rows):
        raise ConfigError(f"eval_fraction {config.eval_fraction} of {len(rows)} rows leaves nothing to train on")
    chosen = set(random.Random(config.seed).sample(range(len(rows)), count))
    kept = [row for index, row in enumerate(rows) if index not in chosen]
    out = [row for index, row in enumerate(rows) if index in chosen]
    return task.encode(kept, tokenizer, length), task.encode(out, tokenizer, length)


def _describe(prepared: Prepared, folder: Path, steps: int) -> Outcome:
    trainable = sum(p.numel() for p in prepared.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in prepared.model.parameters())
    return Outcome(
        folder=folder,
        model=prepared.model,
        steps=steps,
        trainable=trainable,
        parameters=everything - trainable,
        adapter_bytes=0,
        examples=len(prepared.train.examples),
        held_out=len(prepared.evaluation.examples) if prepared.evaluation is not None else 0,
        facts=prepared.task.facts(),
    )
