"""Inlay puts small trainable adapters into a frozen PyTorch model, in place, and takes them out again.

Names are loaded when they are used: importing the package imports torch and nothing larger.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Public name -> the module that defines it, under the same name.
_HOMES: dict[str, str] = {
    **dict.fromkeys(["get_base_model_state_dict", "set_base_model_state_dict"], "inlay.models.base_weights"),
    **dict.fromkeys(["convert_to_lora", "save_as_lora"], "inlay.models.conversion"),
    "find_kappa_target_modules": "inlay.models.kappa",
    **dict.fromkeys(
        [
            "adapter_tensors",
            "get_peft_model_state_dict",
            "iter_merged",
            "load_peft_weights",
            "set_peft_model_state_dict",
        ],
        "inlay.checkpoint",
    ),
    **dict.fromkeys(["PeftConfig", "PeftType", "TaskType"], "inlay.config"),
    **dict.fromkeys(
        ["get_peft_config", "get_peft_model", "inject", "inject_adapter_in_model", "plan"], "inlay.models.entry"
    ),
    **dict.fromkeys(["get_layer_status", "get_model_status"], "inlay.models.status"),
    **dict.fromkeys(
        ["cast_mixed_precision_params", "prepare_model_for_kbit_training", "shift_tokens_right"],
        "inlay.models.preparing",
    ),
    **dict.fromkeys(
        [
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
        ],
        "inlay.models.tasks",
    ),
    **dict.fromkeys(
        [
            "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
            "PEFT_TYPE_TO_CONFIG_MAPPING",
            "PEFT_TYPE_TO_TUNER_MAPPING",
        ],
        "inlay.models.mappings",
    ),
    **dict.fromkeys(
        [
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
        ],
        "inlay.models.auto",
    ),
    **dict.fromkeys(["LoraConfig", "LoraRuntimeConfig"], "inlay.methods.lora"),
    "AdapterStore": "inlay.residency",
    "explain": "inlay.core.explain",
    "without_fast_paths": "inlay.kernels.switch",
    "FourierFTConfig": "inlay.methods.fourierft",
    "IA3Config": "inlay.methods.ia3",
    "InlayError": "inlay.errors",
    "InlayWarning": "inlay.errors",
    "LNTuningConfig": "inlay.methods.ln_tuning",
    "LoHaConfig": "inlay.methods.loha",
    "LoKrConfig": "inlay.methods.lokr",
    "C3AConfig": "inlay.methods.c3a",
    "GraloraConfig": "inlay.methods.gralora",
    "MissConfig": "inlay.methods.miss",
    "WaveFTConfig": "inlay.methods.waveft",
    "ShiraConfig": "inlay.methods.shira",
    "DeloraConfig": "inlay.methods.delora",
    "OFTConfig": "inlay.methods.oft",
    "PeanutConfig": "inlay.methods.peanut",
    "BeftConfig": "inlay.methods.beft",
    "PsoftConfig": "inlay.methods.psoft",
    "GloraConfig": "inlay.methods.glora",
    "DeftConfig": "inlay.methods.deft",
    "HiraConfig": "inlay.methods.hira",
    "RoadConfig": "inlay.methods.road",
    "HRAConfig": "inlay.methods.hra",
    "BOFTConfig": "inlay.methods.boft",
    "PeftMixedModel": "inlay.models.mixed",
    "PeftModel": "inlay.models.peft_model",
    "SupertuningConfig": "inlay.methods.supertuning",
    "OSFConfig": "inlay.methods.osf",
    "TrainableTokensConfig": "inlay.methods.trainable_tokens",
    "PveraConfig": "inlay.methods.pvera",
    "VeraConfig": "inlay.methods.vera",
    "call": "inlay.models.calls",
    "install_as_peft": "inlay.compat.install",
    "register": "inlay.core.registry",
    "register_bank": "inlay.kernels.experts_forms",
    "prepare_for_compile": "inlay.models.compiled",
    "merge_checkpoint": "inlay.models.merge_disk",
}

__version__ = "0.1.0"
__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdapterStore",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BeftConfig",
    "C3AConfig",
    "DeftConfig",
    "DeloraConfig",
    "FourierFTConfig",
    "GloraConfig",
    "GraloraConfig",
    "HRAConfig",
    "HiraConfig",
    "IA3Config",
    "InlayError",
    "InlayWarning",
    "LNTuningConfig",
    "LoHaConfig",
    "LoKrConfig",
    "LoraConfig",
    "LoraRuntimeConfig",
    "MissConfig",
    "OFTConfig",
    "OSFConfig",
    "PeanutConfig",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PsoftConfig",
    "PveraConfig",
    "RoadConfig",
    "ShiraConfig",
    "SupertuningConfig",
    "TaskType",
    "TrainableTokensConfig",
    "VeraConfig",
    "WaveFTConfig",
    "adapter_tensors",
    "call",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "explain",
    "find_kappa_target_modules",
    "get_base_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject",
    "inject_adapter_in_model",
    "install_as_peft",
    "iter_merged",
    "load_peft_weights",
    "merge_checkpoint",
    "plan",
    "prepare_for_compile",
    "prepare_model_for_kbit_training",
    "register",
    "register_bank",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "without_fast_paths",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
