"""The constants of PEFT; default targets come from the table that Inlay itself uses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import ALL_LINEAR, CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, PeftType
from inlay.config.defaults import default_feedforward, default_targets, families

__all__ = [
    "ALLOWED_COMPUTE_DTYPES",
    "CONFIG_NAME",
    "DUMMY_MODEL_CONFIG",
    "DUMMY_TARGET_MODULES",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "MIN_TARGET_MODULES_FOR_OPTIMIZATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "UPCAST_DTYPES",
    "WEIGHTS_NAME",
    "bloom_model_postprocess_past_key_value",
    "starcoder_model_postprocess_past_key_value",
]

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
DUMMY_TARGET_MODULES = "dummy-target-modules"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = ALL_LINEAR
MIN_TARGET_MODULES_FOR_OPTIMIZATION = 20
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
UPCAST_DTYPES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}

for _method in PeftType:
    if families(_method):
        _name = f"TRANSFORMERS_MODELS_TO_{_method.value.replace('LN_TUNING', 'LNTUNING')}_TARGET_MODULES_MAPPING"
        globals()[_name] = {family: default_targets(_method, family) for family in families(_method)}
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {
    family: default_feedforward(family) for family in families(PeftType.IA3)
}


def bloom_model_postprocess_past_key_value(past_key_values: list[Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    """Lay prefixes out as old Bloom models keep their cache.

    Args:
        past_key_values: two tensors or more (layers, batch, heads, tokens, head_dim) that together hold keys, then
            values.

    Returns:
        For each layer, keys (batch * heads, head_dim, tokens) and values (batch * heads, tokens, head_dim).
    """
    joined = torch.cat(list(past_key_values))
    layers, batch, heads, tokens, width = joined.shape
    keys, values = joined.reshape(2, layers // 2, batch * heads, tokens, width)
    return tuple(zip(keys.transpose(2, 3), values, strict=True))


def starcoder_model_postprocess_past_key_value(past_key_values: list[Tensor]) -> tuple[Tensor, ...]:
    """Lay prefixes out as multi-query models keep their cache: one head, keys and values side by side.

    Args:
        past_key_values: for each layer a tensor (2, batch, heads, tokens, head_dim).

    Returns:
        For each layer (batch, tokens, 2 * head_dim), from the first head.
    """
    return tuple(torch.cat([layer[0][:, 0], layer[1][:, 0]], dim=-1) for layer in past_key_values)
