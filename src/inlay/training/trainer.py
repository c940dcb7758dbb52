"""transformers' Trainer, taught to keep adapters: small atomic checkpoints that resume to the same bits.

Checkpoints hold the adapter, the optimiser, the schedule and the random states, not the base model. A checkpoint is
written under another name and renamed when it is whole, so a folder called ``checkpoint-N`` can always be resumed
from, whenever the process was killed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import inlay
from inlay.errors import CheckpointMismatchError
from inlay.training.order import Examples, Pace, Passes
from inlay.training.pretrained import WEIGHTS_FILE
from inlay.training.settings import RunConfig
from inlay.training.tasks import Task

PREFIX = "checkpoint-"
STAGING = "unfinished"


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in ``folder``, the oldest first."""
    found = [path for path in folder.glob(PREFIX + "*") if path.name[len(PREFIX) :].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[len(PREFIX) :]))


def training_arguments(
    config: RunConfig, folder: Path, pace: Pace, evaluates: bool, resumes: bool
) -> TrainingArguments:
    """Translate the run's settings; ``folder`` takes the checkpoints."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=pace.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        use_cpu=config.cpu,
        logging_strategy="steps",
        logging_steps=config.log_steps,
        logging_nan_inf_filter=False,  # the filter replaces a loss of NaN by an average; we want to stop
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_steps or pace.per_pass,
        eval_on_start=evaluates and not resumes,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=None,  # rotation happens after the rename, here below
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available() and not config.cpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        report_to="none",
    )


class AdapterTrainer(Trainer):
    """Trains the adapters of ``model`` on ``task``.

    Args:
        model: an :class:`inlay.PeftModel`.
        task: supplies loss, collator and metrics.
        train: what to train on, in order.
        keep: number of checkpoints to keep.
    """

    def __init__(
        self,
        model: Any,
        task: Task,
        tokenizer: Any,
        arguments: TrainingArguments,
        train: Passes,
        evaluation: Examples | None,
        keep: int,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            data_collator=task.collator(tokenizer),
            train_dataset=train,
            eval_dataset=evaluation,
            compute_loss_func=_loss_of(task),
            compute_metrics=lambda result: task.metrics(*_arrays(result)),
            preprocess_logits_for_metrics=lambda logits, labels: task.reduce(
                logits[0] if isinstance(logits, tuple) else logits, labels
            ),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # The collator aligns labels with logits and the loss is ours: Trainer must neither shift the labels when it
        # counts them nor pass the count on to the model.
        self._loss_shifts_labels = False
        self.model_accepts_loss_kwargs = False
        self.keep = keep
        self.tokens_seen = 0  # by this process in this session: not padding
        self._staged = False
        self._untrained: tempfile.TemporaryDirectory[str] | None = None

    def keep_untrained(self) -> None:
        """Let the adapter be saved in the end over the base weights before its start; as it is now, it is untrained."""
        self._untrained = tempfile.TemporaryDirectory(prefix="inlay-untrained-")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="adapter .* was trained over base weights")  # it was not
            self.accelerator.unwrap_model(self.model).save_pretrained(self._untrained.name)

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]  # Passes shuffles

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.tokens_seen += int(inputs["attention_mask"].sum())
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; in training, with what the adapter's method adds to the loss."""
        found = super().compute_loss(model, *args, **kwargs)
        term = inlay.penalty(self.accelerator.unwrap_model(model)) if model.training else None
        if term is None:
            return found
        # the task's loss is a part of the mean over all batches of a step, and this is the same in each of them
        term = term / self.current_gradient_accumulation_steps
        if isinstance(found, tuple):
            return found[0] + term.to(found[0].device), *found[1:]
        return found + term.to(found.device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, without a trace in the random state: evaluating more or less often changes no training."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        with torch.random.fork_rng(devices=devices):
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer; a task that knows the exact loss replaces the mean over batches of unequal size."""
        result = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        own = result.metrics.pop(f"{prefix}_exact_loss", None) if result.metrics else None
        if result.metrics and own is not None:
            result.metrics[f"{prefix}_loss"] = own
        return result

    # checkpoints ---------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staged else folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        if self.is_world_process_zero():
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staged = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staged = False
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return
        for written in (folder / STAGING).iterdir():
            for path in written.rglob("*"):
                _to_disk(path)
            shutil.rmtree(folder / written.name, ignore_errors=True)
            os.replace(written, folder / written.name)
        (folder / STAGING).rmdir()
        for old in checkpoints(folder)[: -self.keep]:
            shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the adapter alone; the base model is where it was loaded from."""
        unwrapped = self.accelerator.unwrap_model(self.model)
        keywords: dict[str, Any] = {} if state_dict is None else {"state_dict": state_dict}
        if self._untrained is not None and not self._staged:
            keywords["path_initial_model_for_weight_conversion"] = self._untrained.name
        if self.args.should_save:
            unwrapped.save_pretrained(output_dir or self.args.output_dir, **keywords)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        from safetensors.torch import load_file

        unwrapped = self.accelerator.unwrap_model(model if model is not None else self.model)
        state = load_file(os.path.join(resume_from_checkpoint, WEIGHTS_FILE))
        result = inlay.set_peft_model_state_dict(unwrapped, state)
        if result.unexpected_keys:
            raise CheckpointMismatchError(
                f"{resume_from_checkpoint} has tensors that this run does not train: {result.unexpected_keys[:3]}"
            )


def _loss_of(task: Task) -> Callable[..., torch.Tensor]:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return task.loss(outputs["logits"], labels, num_items_in_batch)

    return loss


def _arrays(result: EvalPrediction) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Reduced predictions and labels; both are one array each, because :meth:`Task.reduce` returns one tensor."""
    return numpy.asarray(result.predictions), numpy.asarray(result.label_ids)


def _to_disk(path: Path) -> None:
    """Make a file's content survive a power cut before its checkpoint gets its final name."""
    if path.is_file():
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
