"""What ``peft.helpers`` has beside the classes that it imports."""

from __future__ import annotations

import functools
import inspect
import os
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from inlay.config import PeftConfig
from inlay.core.remember import is_remembering, remember
from inlay.core.state import find_states
from inlay.errors import ConfigError, did_you_mean
from inlay.models.temporary import disable_input_dtype_casting, rescale_adapter_scale
from inlay.models.terms import monteclora_term
from inlay.models.tuner import AdapterModel

__all__ = [
    "DoraCaching",
    "MontecloraTrainerMixin",
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def update_forward_signature(model: Any) -> None:
    """Give the ``forward`` of a wrapper the signature and docstring of its model's, where it takes anything."""
    _take_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    """Give the ``generate`` of a wrapper the signature and docstring of its model's, where it takes anything."""
    if hasattr(model, "generate"):
        _take_signature(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Do so for ``forward``, ``generate``, or ``all`` of them.

    Raises:
        ConfigError: another word.
    """
    known = ("forward", "generate", "all")
    if method not in known:
        raise ConfigError(f"method: expected one of {', '.join(known)}, found {method!r}.{did_you_mean(method, known)}")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _take_signature(model: Any, name: str) -> None:
    own = getattr(model, name)
    kinds = [parameter.kind for parameter in inspect.signature(own).parameters.values()]
    if kinds not in (
        [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD],
        [inspect.Parameter.VAR_KEYWORD],
    ):
        return
    original = getattr(type(model.get_base_model()), name, None)
    if original is None:
        return
    function = own.__func__

    @functools.wraps(original, assigned=("__doc__", "__name__", "__annotations__"))
    def forwarding(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    setattr(model, name, MethodType(forwarding, model))


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder or Hub repository holds an adapter's configuration that can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever a Hub client may raise, the answer is no
        return False
    return True


class DoraCaching:
    """Keeps DoRA's row norms between forwards in eval mode, inside a ``with`` block or, when called, for good.

    Norms are computed anew after a change of the weights that torch counts (optimisers, ``load_state_dict``, hot swap,
    in-place operations); writes through ``tensor.data`` are not counted. Outputs are those without caching.

    ::

        with DoraCaching():
            model(**inputs)
        DoraCaching()(enabled=True)

    Args:
        enabled: whether norms are kept inside the block.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.prev_value: bool | None = None

    def __enter__(self) -> None:
        self.prev_value = is_remembering()
        remember(self.enabled)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        remember(bool(self.prev_value))
        self.prev_value = None

    def __call__(self, enabled: bool = True) -> None:
        remember(enabled)


class MontecloraTrainerMixin:
    """Goes before a trainer's class, and adds the term of MonteCLoRA to its loss where the model has not done so."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the trainer's loss, or (loss, outputs)."""
        base: Any = super()
        result = base.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        wrapped = [module.state for module in model.modules() if isinstance(module, AdapterModel)]
        states = find_states(model)
        terms = [
            term
            for state in states
            if not (state.policy.adds_every_term and any(state is one for one in wrapped))
            if (term := monteclora_term(state)) is not None
        ]
        if not terms:
            return result
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + sum(term.to(loss.device) for term in terms) / len(states)
        return (loss, outputs) if return_outputs else loss
