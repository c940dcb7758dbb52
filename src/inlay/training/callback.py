"""The end of a training step, for transformers' ``Trainer``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from inlay.training.lifecycle import step

__all__ = ["AdamssAsaCallback", "AdapterCallback"]


class AdapterCallback(TrainerCallback):
    """Calls :func:`inlay.step` after every step of the optimiser: ``Trainer(..., callbacks=[AdapterCallback()])``."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        if model is not None:
            step(model, state.global_step)


AdamssAsaCallback = AdapterCallback  # PEFT's name
