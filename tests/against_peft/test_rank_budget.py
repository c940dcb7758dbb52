"""AdaLoRA in training beside PEFT's: the term of the loss, which ranks are left after each step, and what is saved."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from torch import Tensor, nn
from twins import ours_of

import inlay


class Net(nn.Module):
    """Two layers under a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 12)
        self.last = nn.Linear(12, 6)

    def forward(self, x: Tensor, target: Tensor) -> Any:
        y = self.last(torch.tanh(self.first(x)))
        return SimpleNamespace(loss=(y - target).square().mean(), y=y)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 10, generator=generator), torch.randn(8, 6, generator=generator)


def pair(**fields: Any) -> tuple[Any, Any]:
    """PEFT's model and ours with equal values, E moved off zero so that no two ranks are equally important."""
    torch.manual_seed(0)
    base = Net()
    schedule = {"init_r": 5, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 14, "deltaT": 2, "lora_alpha": 7}
    config = peft.AdaLoraConfig(target_modules=["first", "last"], **{**schedule, **fields})
    ours = inlay.get_peft_model(copy.deepcopy(base), ours_of(config))
    theirs = peft.get_peft_model(base, config)
    own = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
            own[name].copy_(parameter)
    return theirs, ours


def train(model: Any, steps: range) -> list[float]:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    losses = []
    for step in steps:
        optimiser.zero_grad()
        loss = model.base_model(*batch(step)).loss  # a plain PeftModel of PEFT passes its tuner by
        loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        losses.append(float(loss))
    return losses


def short(pattern: dict[str, list[bool]] | None) -> dict[str, list[bool]] | None:
    return None if pattern is None else {key.removesuffix(".default"): kept for key, kept in pattern.items()}


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Any]:
    theirs, ours = pair()
    for step in range(14):
        found, expected = (train(model, range(step, step + 1)) for model in (ours, theirs))
        assert found == pytest.approx(expected, rel=1e-5)
        patterns = [short(model.peft_config["default"].rank_pattern) for model in (ours, theirs)]
        assert patterns[0] == patterns[1], step
    return theirs, ours


def test_training_takes_the_ranks_that_peft_takes(trained: tuple[Any, Any]) -> None:
    theirs, ours = trained
    own = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(own[name], parameter, rtol=1e-4, atol=1e-5)
    pattern = ours.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 4
    assert len({sum(kept) for kept in pattern.values()}) == 2  # the ranks did move


def test_files_hold_the_ranks_that_are_left(trained: tuple[Any, Any], tmp_path) -> None:
    theirs, ours = trained
    expected = peft.get_peft_model_state_dict(theirs)
    found = inlay.get_peft_model_state_dict(ours)
    assert {key: t.shape for key, t in found.items()} == {key: t.shape for key, t in expected.items()}
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(str(tmp_path / "theirs"))
    torch.manual_seed(0)
    base, x = Net(), batch(50)
    want = ours(*x).y
    for read in (
        peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"), is_trainable=True),
        inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs"),
        inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours"),
    ):
        torch.testing.assert_close(read(*x).y, want, rtol=1e-4, atol=1e-5)
    merged = inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").merge_and_unload()
    torch.testing.assert_close(merged(*x).y, want, rtol=1e-4, atol=1e-5)


def test_training_goes_on_from_a_file_and_its_file_can_be_read(trained: tuple[Any, Any], tmp_path) -> None:
    """What is taken away then is said of all the ranks of the start, or PEFT could not read the next file."""
    _, ours = trained
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    read = inlay.PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    read.peft_config["default"].total_step = 30
    read.peft_config["default"].target_r = 1
    train(read, range(3, 30))
    pattern = read.peft_config["default"].rank_pattern
    assert sum(sum(kept) for kept in pattern.values()) == 2
    assert all(len(kept) == 5 for kept in pattern.values())
    read.save_pretrained(tmp_path / "next")
    torch.manual_seed(0)
    base, x = Net(), batch(51)
    for again in (
        peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "next"), is_trainable=True),
        inlay.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "next"),
    ):
        torch.testing.assert_close(again(*x).y, read(*x).y, rtol=1e-4, atol=1e-5)


def test_a_file_with_fewer_ranks_fits_a_model_that_has_all(trained: tuple[Any, Any]) -> None:
    _, ours = trained
    values = inlay.get_peft_model_state_dict(ours)
    _, other = pair()
    other.peft_config["default"].rank_pattern = ours.peft_config["default"].rank_pattern
    inlay.set_peft_model_state_dict(other, values)
    x = batch(52)
    torch.testing.assert_close(other(*x).y, ours(*x).y)


def test_the_term_of_the_loss_is_for_training(trained: tuple[Any, Any]) -> None:
    """PEFT adds it to the loss of an evaluation as well, and fails where no adapter trains; docs/differences.md."""
    theirs, ours = trained
    x = batch(53)
    with torch.no_grad():
        plain = (ours(*x).y - x[1]).square().mean()
        assert float(ours(*x).loss) == pytest.approx(float(plain))
        assert float(theirs.base_model(*x).loss) > float(plain) + 0.1
    term = inlay.penalty(ours)
    assert term is not None
    assert float(ours(*x).loss) == pytest.approx(float(plain + term))
    assert float(theirs(*x).loss) == pytest.approx(float(plain), rel=1e-4)  # the plain wrapper; docs/differences.md


def test_no_gradients_are_said_and_a_budget_of_all_ranks_takes_none() -> None:
    theirs, ours = pair(target_r=5, tinit=0, deltaT=1)
    with pytest.raises(RuntimeError, match="no gradients"):
        inlay.step(ours, 1)
    assert train(ours, range(1, 5))
    assert all(all(kept) for kept in ours.peft_config["default"].rank_pattern.values())
    with pytest.raises(RuntimeError, match="kthvalue"):  # docs/differences.md
        train(theirs, range(1, 5))


def test_equal_importance_takes_no_more_than_the_budget_says() -> None:
    """With E at zero nothing is important yet, and PEFT takes every rank away at once; docs/differences.md."""
    theirs, ours = pair(tinit=0, deltaT=1, orth_reg_weight=0.0)
    with torch.no_grad():
        for model in (theirs, ours):
            for name, parameter in model.named_parameters():
                if "lora_E" in name or "lora_B" in name:
                    parameter.zero_()
    for model in (theirs, ours):
        train(model, range(1, 2))
    left = [sum(map(sum, model.peft_config["default"].rank_pattern.values())) for model in (theirs, ours)]
    config = theirs.peft_config["default"]
    budget, _ = RankAllocator(theirs.base_model.model, config, "default").budget_schedule(1)
    assert left == [0, budget]
