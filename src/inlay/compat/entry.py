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

    What PEFT lets pass, or does without being asked, is let pass and done. Warns where the model has adapters already,
    and where the configuration names another base model or revision than what it is now used with.
    """
    _announce(model, peft_config, revision)
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


def _announce(model: nn.Module, config: PeftConfig, revision: str | None) -> None:
    """Warn of what is about to be overwritten or added to."""
    if getattr(model, "peft_config", None):
        warnings.warn(
            f"{type(model).__name__} has adapters already, and they stay; unload them first if the model is to be bare",
            InlayWarning,
            stacklevel=3,
        )
    named, name = config.base_model_name_or_path, getattr(model, "name_or_path", None) or None
    if named is not None and named != name:
        warnings.warn(
            f"base_model_name_or_path is {named!r} in the configuration and becomes {name!r}, as the model says",
            InlayWarning,
            stacklevel=3,
        )
    if revision is not None and config.revision not in (None, revision):
        warnings.warn(
            f"the configuration says revision {config.revision!r}, and the call {revision!r}, which is taken",
            InlayWarning,
            stacklevel=3,
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
