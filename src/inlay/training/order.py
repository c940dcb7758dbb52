"""The order in which examples are trained on, and how many steps that makes.

The whole run is one sequence: pass after pass over the examples, each in an order of its own that follows from the
seed and the pass alone. Every step is full, a batch may hold the end of one pass and the beginning of the next, and
step N begins at the same place however often the run was interrupted before it. (Trainer's own epochs end in short
steps, which some of its versions skip when they resume within an epoch.)
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inlay.training.settings import RunConfig
from inlay.training.tasks import Example


@dataclass(frozen=True)
class Pace:
    """Sizes of a run: examples per step over all processes, steps per pass, steps in all."""

    per_step: int
    per_pass: int
    steps: int

    @classmethod
    def of(cls, config: RunConfig, examples: int, processes: int) -> Pace:
        per_step = config.batch_size * config.accumulate * processes
        steps = config.max_steps or math.ceil(config.epochs * examples / per_step)
        return cls(per_step, math.ceil(examples / per_step), steps)


class Examples(torch.utils.data.Dataset):
    """The examples as they are, for evaluation."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class Passes(Examples):
    """``length`` examples: as many shuffled passes over ``examples`` as that takes."""

    def __init__(self, examples: Sequence[Example], length: int, seed: int) -> None:
        super().__init__(examples)
        self.length, self.seed = length, seed
        self._shuffled: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        turn, place = divmod(index, len(self.examples))
        return self.examples[self.order(turn)[place]]

    def order(self, turn: int) -> list[int]:
        """Return the permutation of pass ``turn``; the last one stays in memory."""
        if turn not in self._shuffled:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{turn}").shuffle(order)
            self._shuffled = {turn: order}
        return self._shuffled[turn]
