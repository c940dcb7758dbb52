"""The functions of PEFT that put adapters into a model: Inlay's, under the policy ``peft``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from inlay.config import PeftConfig
from inlay.core.policy import PEFT
from inlay.errors import InlayWarning
from inlay.models.entry import get_peft_config, inject_bare, wrap
from inlay.models.peft_model import PeftModel

__all__ = ["get_peft_config", "get_peft_model", "inject_adapter_in_model"]


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put an adapter into a model, in place, and return the wrapper that drives it; see :func:`inlay.get_peft_model`.

    What PEFT lets pass, or does without being asked, is let pass and done.
    """
    return wrap(
        model,
        peft_config,
        adapter_name,
        policy=PEFT,
        mixed=mixed,
        autocast=autocast_adapter_dtype,
        revision=revision,
        low_memory=low_cpu_mem_usage,
    )


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> Any:
    """Put an adapter into a model, in place and without a wrapper; see :func:`inlay.inject_adapter_in_model`.

    The adapter's tensors have the dtype of the model. Warns where the model has adapters already, as PEFT does.
    """
    held: Any = getattr(model, "peft_config", None)
    if held and adapter_name not in held:
        warnings.warn(
            f"{type(model).__name__} has adapters already ({', '.join(map(repr, held))}); "
            f"{adapter_name!r} is added to them",
            InlayWarning,
            stacklevel=2,
        )
    return inject_bare(peft_config, model, adapter_name, low_cpu_mem_usage, state_dict, policy=PEFT, autocast=False)
