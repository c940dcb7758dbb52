"""The names under which methods and tasks are saved: PEFT's, so that files can be exchanged."""

from __future__ import annotations

from enum import Enum

__all__ = ["PeftType", "TaskType", "method_name"]


class PeftType(str, Enum):
    """Every method name that a PEFT 0.21.2 ``adapter_config.json`` may carry.

    A name being listed says that files with it are recognised, not that the method is available:
    `inlay.core.registry.method_types` lists those.
    """

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


class TaskType(str, Enum):
    """What the adapted model is for; chooses the wrapper class that `get_peft_model` returns."""

    SEQ_CLS = "SEQ_CLS"  # classify a whole text
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"  # encoder-decoder generation
    CAUSAL_LM = "CAUSAL_LM"  # next-token generation
    TOKEN_CLS = "TOKEN_CLS"  # a label per token
    QUESTION_ANS = "QUESTION_ANS"  # a span of the context
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"  # hidden states as embeddings


def method_name(peft_type: PeftType | str) -> str:
    """Return the name of a method, one of PEFT's or one's own, as files have it."""
    return str(getattr(peft_type, "value", peft_type))
