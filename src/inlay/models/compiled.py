"""A model made ready to be compiled once, whatever adapters become active after that."""

from __future__ import annotations

from torch import nn

from inlay.checkpoint.tree import bare_model
from inlay.core.fixed import FixedSlots
from inlay.core.state import find_states
from inlay.errors import ConfigError, TargetError

__all__ = ["prepare_for_compile"]


def prepare_for_compile(model: nn.Module, *, slots: int = 1, max_rank: int) -> None:
    """Let compiled code have the active adapters in fixed places, so that changing them compiles nothing anew.

    ::

        inlay.prepare_for_compile(model, slots=1, max_rank=64)
        fast = torch.compile(model)
        fast(batch)
        model.set_adapter("other")  # of any rank up to 64: its tensors are copied, and nothing is compiled
        fast(batch)

    The same goes for a change of scale, a hot swap, adapters that are loaded later onto the same layers, and no adapter
    at all in a slot. Different graphs remain for training and evaluation, with and without gradient, adapters disabled,
    merged, or chosen by sample, and for layers with an active set of their own.

    The parameters stay what they are, under their names and in their sizes; those of an active adapter lie in its slot
    from now on, in memory that is the slot's. So an optimiser trains them as always, and what is saved is the adapter.
    Gradients come to them when backward is through with the whole tensor of the slot: hooks on single parameters
    (``register_hook``), ``torch.autograd.grad`` by them, and wrappers that wait for gradients of their own accord
    (DDP, FSDP) do not work on compiled code then. Some fused optimisers want equal strides in their state, so make the
    optimiser afterwards. Memory: for each slot a tensor of the largest rank in place of the active adapter's own; and
    every slot costs its products, also an empty one, and those of backward where gradients are on, also for a frozen
    adapter. A copy of the model is not prepared.

    Call it once the model has an adapter, before or after ``torch.compile``, and again to change the numbers.

    Args:
        model: a ``PeftModel`` or a model with injected adapters, compiled or not.
        slots: how many adapters may be active at once.
        max_rank: the largest rank of any adapter.

    Raises:
        ConfigError: a number is out of range.
        TargetError: the model has no adapter.
        UnsupportedError: an adapter has a larger rank, is not low-rank, has more than tensors at layers, or another
            dropout, dtype or set of tensors than another one; or more are active than there are slots. Adapters that
            come later are refused when they are to become active. In each case the model is as before.
    """
    for what, number in (("slots", slots), ("max_rank", max_rank)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ConfigError(f"{what}: expected a whole number of at least 1, found {number!r}")
    states = [state for state in find_states(bare_model(model)[0]) if state.records]
    if not states:
        raise TargetError("the model has no adapter; add or load the first one before calling prepare_for_compile")
    made = [FixedSlots(slots, max_rank) for _ in states]
    for state, fixed in zip(states, made, strict=True):
        fixed.check_all(state)
    for state, fixed in zip(states, made, strict=True):
        if state.fixed is not None:
            state.fixed.end(state)
        state.fixed = fixed
        state.touch()
