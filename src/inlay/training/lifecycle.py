"""What methods do in training beside forward and backward, for a training loop of one's own."""

from __future__ import annotations

from torch import Tensor, nn

from inlay.core.lifecycle import penalty_of, step_of
from inlay.models.root import state_of

__all__ = ["penalty", "step"]


def penalty(model: nn.Module) -> Tensor | None:
    """Return what the methods of the adapters in training add to the loss, a scalar; None where they add nothing.

    A wrapped model whose output has a ``loss`` has it in there already, but for the terms of KaSA and MonteCLoRA under
    PEFT's policy, which leaves them to the training loop. It is for losses that are computed outside, and for bare
    models::

        loss = my_loss(model(x), y)
        term = inlay.penalty(model)
        loss = loss if term is None else loss + term

    Args:
        model: a model with adapters, bare or wrapped.

    Raises:
        StateError: the model has no adapters.
    """
    return penalty_of(state_of(model))


def step(model: nn.Module, global_step: int) -> None:
    """Let the methods of the adapters in training do what belongs to the end of a step: move ranks, switch parts off.

    Call it after ``loss.backward()`` and ``optimizer.step()`` and before ``optimizer.zero_grad()``, in every step. It
    does nothing for methods that have nothing to do. With transformers' ``Trainer``, add
    :class:`inlay.training.callback.AdapterCallback` instead.

    Args:
        model: a model with adapters, bare or wrapped.
        global_step: how many steps of the optimiser were finished before this one.

    Raises:
        StateError: the model has no adapters, or they have no gradients.
    """
    step_of(state_of(model), global_step)
