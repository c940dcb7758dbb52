"""Poly beside PEFT's: a task for each sample, in evaluation and in training, and what goes wrong without one."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from twins import close, ours_of

import inlay
from inlay.errors import RoutingError, UnsupportedError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.last = nn.Linear(12, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))
TASKS = torch.tensor([2, 0, 1, 2])


def base() -> Net:
    torch.manual_seed(0)
    return Net()


def pair(**fields: Any) -> tuple[Any, Any]:
    given = {"r": 2, "n_tasks": 3, "n_skills": 2, "n_splits": 2, "target_modules": ["first", "last"], **fields}
    config = peft.PolyConfig(**given)
    ours = inlay.get_peft_model(base(), ours_of(config)).eval()
    theirs = peft.get_peft_model(base(), config).eval()
    own = dict(ours.named_parameters())
    assert {name: tuple(p.shape) for name, p in own.items()} == {
        name: tuple(p.shape) for name, p in theirs.named_parameters()
    }
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
                own[name].copy_(parameter)
    return theirs, ours


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("splits", [1, 2])
def test_outputs_and_gradients_by_task(training: bool, splits: int) -> None:
    """In training both draw from the same stream of random numbers."""
    theirs, ours = pair(n_splits=splits)
    outputs = []
    for model in (theirs, ours):
        model.train(training)
        model.zero_grad()
        torch.manual_seed(7)
        y = model.base_model(X, task_ids=TASKS)  # a plain PeftModel of PEFT passes its tuner by
        (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
        outputs.append(y)
    close(outputs[1], outputs[0])
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            close(own[name].grad, parameter.grad, 1e-4)


def test_files_go_both_ways(tmp_path) -> None:
    theirs, ours = pair()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    expected = ours(X, task_ids=TASKS)
    read = peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours")).eval()
    close(read.base_model(X, task_ids=TASKS), expected)
    close(inlay.PeftModel.from_pretrained(base(), tmp_path / "theirs")(X, task_ids=TASKS), expected)


def test_each_sample_has_its_own_task_whatever_its_adapter_and_its_neighbours() -> None:
    _, ours = pair()
    ours.add_adapter("other", copy.deepcopy(ours.peft_config["default"]))
    ours.base_model.state.training.clear()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if ".other" in name:
                parameter.add_(0.3)
    names = ["other", "default", "other", "__base__"]
    mixed = ours(X, task_ids=TASKS, adapter_names=names)
    for row, name in enumerate(names):
        x, task = X[row : row + 1], TASKS[row : row + 1]
        if name == "__base__":
            with ours.disable_adapter():
                alone = ours(x)
        else:
            ours.set_adapter(name)
            alone = ours(x, task_ids=task)
        close(mixed[row : row + 1], alone)


def test_rows_of_beams_belong_to_the_sample_before_them() -> None:
    """PEFT multiplies the rows of two samples by the weights of one; docs/differences.md."""
    theirs, ours = pair()
    twice = X.repeat_interleave(2, 0)
    close(ours(twice, task_ids=TASKS), ours(X, task_ids=TASKS).repeat_interleave(2, 0))
    with pytest.raises(RuntimeError):
        theirs.base_model(twice, task_ids=TASKS)


def test_a_missing_or_unknown_task_is_said() -> None:
    theirs, ours = pair()
    with pytest.raises(RoutingError, match="has 3 tasks, and none was chosen"):
        ours(X)
    with pytest.raises(ValueError, match="task_ids should not be None"):
        theirs(X)
    for wrong in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, -1, 2])):
        with pytest.raises(RoutingError, match="below n_tasks=3"):
            ours(X, task_ids=wrong)
    with pytest.raises(RoutingError, match="3 samples, and the layer received 4 rows"):
        ours(X, task_ids=TASKS[:3])
    lora = inlay.get_peft_model(base(), inlay.LoraConfig(target_modules=["first"]))
    with pytest.raises(UnsupportedError, match="chooses by task"):
        lora(X, task_ids=TASKS)


def test_a_model_without_a_task_type_takes_task_ids() -> None:
    """PEFT's plain wrapper hands them to the bare model, which does not know them; docs/differences.md."""
    theirs, ours = pair()
    close(ours(X, task_ids=TASKS), theirs.base_model(X, task_ids=TASKS))
    with pytest.raises(TypeError, match="task_ids"):
        theirs(X, task_ids=TASKS)


def test_one_task_needs_no_choice() -> None:
    """PEFT wants task_ids even then; docs/differences.md."""
    theirs, ours = pair(n_tasks=1)
    close(ours(X), theirs.base_model(X, task_ids=torch.zeros(4, dtype=torch.long)))
    with pytest.raises(ValueError, match="task_ids should not be None"):
        theirs(X)


def test_a_bare_model_takes_tasks_from_a_call() -> None:
    _, ours = pair()
    expected = ours(X, task_ids=TASKS)
    with inlay.call(ours, task_ids=TASKS):
        close(ours.base_model.model(X), expected)


def test_splits_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="n_splits=5 does not divide its 8 inputs"):
        inlay.get_peft_model(base(), inlay.PolyConfig(n_splits=5, target_modules=["first"]))
