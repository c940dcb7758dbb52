"""Training tasks: a table from ``--task`` to the class that knows the task.

A task turns rows into token lists, says which head the model needs, what the loss is and which figures describe
an evaluation. The trainer, the checkpoints, the display and the card know nothing of tasks. To add one, write a
module with a :class:`Task` and add it here.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from inlay.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import numpy
    import torch

    from inlay.training.formats import Row
    from inlay.training.settings import RunConfig

TASKS = {
    "causal-lm": ("inlay.training.tasks.causal_lm", "CausalLM"),
    "classify": ("inlay.training.tasks.classify", "Classify"),
}

Example = dict[str, list[int]]
IGNORED = -100  # the label that no loss counts


def task_class(name: str) -> type[Task]:
    """Return the class behind ``--task name``.

    Raises:
        ConfigError: no task of that name.
    """
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is none of {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    module, attribute = TASKS[name]
    return getattr(import_module(module), attribute)


def task_for_type(task_type: str | None) -> type[Task] | None:
    """Return the class whose adapters carry ``task_type`` (``"CAUSAL_LM"``), or None."""
    return next((found for found in map(task_class, TASKS) if found.task_type == task_type), None)


@dataclass
class Encoded:
    """Rows as tokens, and how many were cut at the length limit."""

    examples: list[Example]
    cut: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(example["input_ids"]) for example in self.examples)


class Task(abc.ABC):
    """What is particular to one kind of training."""

    name: ClassVar[str]
    task_type: ClassVar[str]  # `task_type` of the adapter config
    auto_class: ClassVar[str]  # name of the class in transformers
    unit: ClassVar[str]  # what a plain text file is made of: "document" or "line"
    pipeline_tag: ClassVar[str]
    default_length: ClassVar[int]
    main_metric: ClassVar[str]  # key in the evaluation metrics, without the prefix

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @abc.abstractmethod
    def check(self, rows: Sequence[Row], setting: str) -> None:
        """Raise ConfigError, naming ``file:line``, for a row without the fields this task reads."""

    def fit(self, train: Sequence[Row], evaluation: Sequence[Row]) -> None:
        """Learn from checked rows what the model needs to know (the set of labels); nothing by default."""
        return

    def model_options(self) -> dict[str, Any]:
        """Return keywords for ``from_pretrained``."""
        return {}

    @abc.abstractmethod
    def encode(self, rows: Sequence[Row], tokenizer: Any, length: int) -> Encoded:
        """Return one token list per example, with whatever :meth:`collator` turns into labels."""

    def split(self, encoded: Encoded, fraction: float) -> tuple[Encoded, Encoded] | None:
        """Split one lonely document by tokens; None where rows are split instead."""
        return None

    @abc.abstractmethod
    def collator(self, tokenizer: Any) -> Callable[[list[Example]], dict[str, torch.Tensor]]:
        """Return a picklable function from examples to a batch with ``labels`` aligned with the logits."""

    @abc.abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor, count: Any = None) -> torch.Tensor:
        """Return the scalar loss: summed and divided by ``count`` labels, or their mean where it is None."""

    @abc.abstractmethod
    def reduce(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Shrink a batch of logits to the few numbers per example that :meth:`metrics` needs."""

    @abc.abstractmethod
    def metrics(self, reduced: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
        """Return the figures of an evaluation; ``exact_loss`` replaces the mean over batches."""

    def facts(self) -> dict[str, Any]:
        """Return what the run learned from the data (for the card and for ``run.json``)."""
        return {}

    def labels(self) -> list[str] | None:
        """Return the label names, in the order of the head's outputs, for tasks that have them."""
        return None
