"""Getting a base model ready for adapters, and its labels for a loss."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import ConfigError, UnsupportedError
from inlay.models.backprop import let_gradients_in

__all__ = ["cast_mixed_precision_params", "prepare_model_for_kbit_training", "shift_tokens_right"]

_QUANTISED = ("Params4bit", "Int8Params")  # parameter classes whose bytes are not numbers to cast


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a quantised model and raise what is not quantised in it to float32, before adapters are added.

    Args:
        model: a model of transformers; returned.
        use_gradient_checkpointing: switch gradient checkpointing on, for a model that is quantised.
        gradient_checkpointing_kwargs: passed on to the model (``{"use_reentrant": False}``).
        auto_clear_cache: free what the casts left behind in the accelerator's cache.

    Raises:
        UnsupportedError: the model's own switch for gradient checkpointing takes no arguments, and some are given.
    """
    method = getattr(getattr(model, "quantization_method", None), "value", getattr(model, "quantization_method", None))
    loaded = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if method not in ("gptq", "aqlm", "eetq", "hqq", "torchao"):
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ not in _QUANTISED:
                parameter.data = parameter.data.to(torch.float32)
    if use_gradient_checkpointing and (loaded or method):
        arguments = gradient_checkpointing_kwargs or {}
        if arguments.get("use_reentrant", True):
            let_gradients_in(model)
        accepted = inspect.signature(model.gradient_checkpointing_enable).parameters
        if "gradient_checkpointing_kwargs" in accepted:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
        elif arguments:
            raise UnsupportedError(
                f"gradient_checkpointing_kwargs={arguments!r}: {type(model).__name__}.gradient_checkpointing_enable "
                "takes no arguments"
            )
        else:
            model.gradient_checkpointing_enable()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen, and hold what trains in float32.

    Args:
        model: changed in place.
        dtype: of what is frozen, such as ``torch.bfloat16``.

    Raises:
        ConfigError: ``dtype`` is no floating dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"cast_mixed_precision_params: dtype: expected a floating dtype, found {dtype}")
    for parameter in model.parameters():
        if not parameter.is_floating_point() or type(parameter).__name__ in _QUANTISED:
            continue
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """Return decoder inputs for labels: each row one place later, the start token in front.

    Args:
        input_ids: labels (batch, length); places that the loss ignores hold -100.
        pad_token_id: takes the place of -100.
        decoder_start_token_id: comes first.

    Raises:
        ConfigError: ``pad_token_id`` is None.
    """
    if pad_token_id is None:
        raise ConfigError("shift_tokens_right: pad_token_id: expected a number, found None")
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
