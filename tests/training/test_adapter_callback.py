"""The end of a training step: through transformers' trainer, and in a loop of one's own over a bare model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.errors import StateError
from inlay.training.callback import AdamssAsaCallback, AdapterCallback


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(6, 6)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Any]:
        y = self.lin(x)
        return {"loss": (y - labels).square().mean(), "y": y}


def config() -> Any:
    return inlay.AdaLoraConfig(target_modules=["lin"], init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8)


def test_the_trainer_calls_it_after_each_step_while_gradients_are_there(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = inlay.get_peft_model(Net(), config())
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"x": torch.randn(6, generator=generator), "labels": torch.randn(6, generator=generator)} for _ in range(16)
    ]
    seen: list[tuple[int, bool]] = []

    class Spy(AdapterCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trained = [p for p in model.parameters() if p.requires_grad]
            seen.append((state.global_step, all(p.grad is not None for p in trained)))
            super().on_optimizer_step(args, state, control, **kwargs)

    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=8, report_to=[], save_strategy="no", disable_tqdm=True,
        use_cpu=True, learning_rate=0.05, label_names=["labels"], remove_unused_columns=False,
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Spy()]).train()
    assert seen == [(step, True) for step in range(8)]
    pattern = model.peft_config["default"].rank_pattern
    assert {key: sum(kept) for key, kept in pattern.items()} == {"lin.lora_E": 2}


def test_a_bare_model_in_a_loop_of_ones_own() -> None:
    """The same ranks are left, and the term of the loss is asked for, since a bare model has no place for it."""
    model, wrapped = Net(), inlay.get_peft_model(Net(), config())
    inlay.inject(inlay.plan(model, config()))
    x, target = torch.randn(8, 6), torch.randn(8, 6)
    for one in (model, wrapped):
        optimiser = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.3)
        for step in range(8):
            optimiser.zero_grad()
            output = one(x, target)
            term = inlay.penalty(one)
            assert term is not None
            output["loss"] = output["loss"] + term
            output["loss"].backward()
            optimiser.step()
            inlay.step(one, step)
    own = dict(model.named_parameters())
    for name, parameter in wrapped.named_parameters():
        torch.testing.assert_close(own[name.removeprefix("base_model.model.")], parameter)
    assert int((model.lin.lora_E["default"] != 0).sum()) == 2


def test_methods_without_anything_to_do_do_nothing() -> None:
    model = inlay.get_peft_model(Net(), inlay.LoraConfig(target_modules=["lin"]))
    before = {name: p.clone() for name, p in model.named_parameters()}
    inlay.step(model, 3)
    model.base_model.update_and_allocate(3)
    assert inlay.penalty(model) is None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(StateError):
        inlay.step(Net(), 0)


def test_pefts_callback_is_this_one_and_needs_no_model() -> None:
    assert AdamssAsaCallback is AdapterCallback
    AdapterCallback().on_optimizer_step(None, SimpleNamespace(global_step=0), None)
