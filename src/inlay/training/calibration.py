"""The starts that are measured on data: EVA, CorDA and LoRA-GA see some training examples before the first step."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from inlay.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from inlay.training.settings import RunConfig
    from inlay.training.tasks import Example, Task

# after these the adapter belongs to the base as they changed it; at the end it is saved over the base as it was
CHANGES_BASE = ("corda", "lora_ga")
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How an adapter's start is measured.

    Attributes:
        start: ``eva``, ``corda`` or ``lora_ga``.
        batches: what the model reads, labels included.
        device: where it reads them.
    """

    start: str
    batches: list[Batch]
    device: torch.device
    task: Task

    @classmethod
    def of(cls, config: RunConfig, task: Task, tokenizer: Any, examples: list[Example], start: str) -> Calibration:
        """Return what measures a start on the first examples that training is going to see."""
        import torch

        from inlay.training.order import Passes
        from inlay.training.pretrained import accelerator_device

        count, size = min(config.init_examples, len(examples)), config.batch_size
        chosen = Passes(examples, count, config.seed)
        collate = task.collator(tokenizer)
        batches = [collate([chosen[i] for i in range(n, min(n + size, count))]) for n in range(0, count, size)]
        device = torch.device("cpu") if config.cpu else accelerator_device()
        if device.type != "cpu":
            device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        return cls(start, batches, device, task)

    @property
    def examples(self) -> int:
        return sum(len(batch["input_ids"]) for batch in self.batches)

    def before(self, base: Any, adapter: Any) -> None:
        """Measure what the injection of ``adapter`` into ``base`` is going to use."""
        if self.start == "eva":
            return  # it measures below an adapter that is there
        import torch

        with _on(base, self.device):
            if self.start == "corda":
                from inlay.inits.corda import preprocess_corda

                with torch.no_grad():
                    preprocess_corda(base, adapter, run_model=lambda: self._run(base))
            else:
                from inlay.inits.lora_ga import preprocess_loraga

                preprocess_loraga(base, adapter, lambda: self._run(base, self._backward))

    def after(self, model: Any) -> None:
        """Give the adapter of ``model`` what is measured below it."""
        if self.start != "eva":
            return
        from inlay.models.eva import initialize_lora_eva_weights

        with _on(model, self.device):
            # every token counts but padding: a task's labels are not laid out as EVA expects them
            unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in self.batches]
            initialize_lora_eva_weights(model, unlabelled, show_progress_bar=False)

    def _run(self, base: Any, then: Callable[[Any, Batch], None] = lambda output, batch: None) -> None:
        for batch in self.batches:
            batch = {name: value.to(self.device) for name, value in batch.items()}
            then(base(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]), batch)

    def _backward(self, output: Any, batch: Batch) -> None:
        self.task.loss(output["logits"], batch["labels"]).backward()


def measured_start(adapter: Any) -> str | None:
    """Return the adapter's way to start if it is one that is measured on data.

    Raises:
        UnsupportedError: with KaSA, whose adapter could not be saved over the base model as it was.
    """
    from inlay.config.lora import LoraConfig
    from inlay.inits import start_of

    if not isinstance(adapter, LoraConfig):
        return None
    start = start_of(adapter.init_lora_weights)
    if not start.measured:
        return "eva" if start.name == "eva" else None
    if adapter.kasa_config is not None:
        raise UnsupportedError(
            f"init {start.name!r} with kasa_config: both change the base model, and the adapter could not be saved so "
            "that it fits the base model as it was; take another init"
        )
    return str(start.name)


@contextmanager
def _on(model: Any, device: torch.device) -> Iterator[None]:
    """Have a model on a device and in eval mode, without caches, and back as it was."""
    before, training = next(model.parameters()).device, model.training
    model.to(device).eval()
    try:
        yield
    finally:
        model.to(before).train(training)
