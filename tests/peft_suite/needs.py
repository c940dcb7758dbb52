"""What a test of PEFT's own suite needs, read from its parameters and its source: configs and features by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

__all__ = ["CONFIGS", "FEATURES", "FILES", "needs_of"]

# Config class of PEFT 0.21.2 -> peft_type.
CONFIGS = {
    "AdaLoraConfig": "ADALORA",
    "AdamssConfig": "ADAMSS",
    "AdaptionPromptConfig": "ADAPTION_PROMPT",
    "BOFTConfig": "BOFT",
    "BeftConfig": "BEFT",
    "C3AConfig": "C3A",
    "CPTConfig": "CPT",
    "CartridgeConfig": "CARTRIDGE",
    "DeftConfig": "DEFT",
    "DeloraConfig": "DELORA",
    "FourierFTConfig": "FOURIERFT",
    "FrodConfig": "FROD",
    "GloraConfig": "GLORA",
    "GraloraConfig": "GRALORA",
    "HRAConfig": "HRA",
    "HiraConfig": "HIRA",
    "IA3Config": "IA3",
    "LNTuningConfig": "LN_TUNING",
    "LilyConfig": "LILY",
    "LoHaConfig": "LOHA",
    "LoKrConfig": "LOKR",
    "LoraConfig": "LORA",
    "MissConfig": "MISS",
    "MultitaskPromptTuningConfig": "MULTITASK_PROMPT_TUNING",
    "OFTConfig": "OFT",
    "OSFConfig": "OSF",
    "PeanutConfig": "PEANUT",
    "PolyConfig": "POLY",
    "PrefixTuningConfig": "PREFIX_TUNING",
    "PromptEncoderConfig": "P_TUNING",
    "PromptTuningConfig": "PROMPT_TUNING",
    "PsoftConfig": "PSOFT",
    "PveraConfig": "PVERA",
    "RandLoraConfig": "RANDLORA",
    "RoadConfig": "ROAD",
    "ShadowConfig": "SHADOW",
    "ShiraConfig": "SHIRA",
    "SupertuningConfig": "SUPERTUNING",
    "TinyLoraConfig": "TINYLORA",
    "TrainableTokensConfig": "TRAINABLE_TOKENS",
    "UniLoraConfig": "UNILORA",
    "VBLoRAConfig": "VBLORA",
    "VeraConfig": "VERA",
    "WaveFTConfig": "WAVEFT",
    "XLoraConfig": "XLORA",
}

# Initialisers, variants and tools of LoRA that are not methods -> how a test says that it uses them.
FEATURES = {
    "pissa": r"pissa",
    "olora": r"\bolora|Olora|OLoRA",
    "corda": r"corda|CorDA",
    "eva": r"\beva\b|Eva(Config|_)|eva_config|_eva_",
    "lora_ga": r"lora_ga|LoraGA|LoRAGA",
    "loftq": r"loftq|LoftQ",
    "orthogonal": r"init_lora_weights=[\"']orthogonal|[\"']orthogonal[\"']",
    "mica": r"\bmica\b|_mica_|mica_",
    "alora": r"alora|aLoRA|aLora",
    "arrow": r"[Aa]rrow",
    "velora": r"velora|Velora|VeLoRA",
    "bdlora": r"bdlora|BdLora|BDLora|BdLoRA",
    "monteclora": r"monteclora|MonteCLoRA|MonteCLora",
    "kasa": r"kasa|Kasa|KaSA",
    "qalora": r"qalora",
    "megatron": r"megatron",
    "gptqmodel": r"gptqmodel",
    "bitsandbytes": r"load_in_(4|8)bit|BitsAndBytes",
}

# Files about one method or tool.
FILES = {
    "test_adamss_asa.py": "ADAMSS",
    "test_adaption_prompt.py": "ADAPTION_PROMPT",
    "test_arrow.py": "arrow",
    "test_bdlora.py": "bdlora",
    "test_boft.py": "BOFT",
    "test_cartridge.py": "CARTRIDGE",
    "test_cpt.py": "CPT",
    "test_deft.py": "DEFT",
    "test_frod.py": "FROD",
    "test_gptqmodel.py": "gptqmodel",
    "test_incremental_pca.py": "eva",
    "test_lora_ga.py": "lora_ga",
    "test_lora_megatron.py": "megatron",
    "test_multitask_prompt_tuning.py": "MULTITASK_PROMPT_TUNING",
    "test_osf.py": "OSF",
    "test_poly.py": "POLY",
    "test_pvera.py": "PVERA",
    "test_randlora.py": "RANDLORA",
    "test_shadow.py": "SHADOW",
    "test_shira.py": "SHIRA",
    "test_supertuning.py": "SUPERTUNING",
    "test_unilora.py": "UNILORA",
    "test_vblora.py": "VBLORA",
    "test_velora.py": "velora",
    "test_xlora.py": "XLORA",
}

_CONFIG = re.compile(r"\b[A-Z]\w*Config\b")


def _words(value: Any, depth: int = 0) -> Iterator[str]:
    """Iterate over the texts that say what a parameter is about."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, type):
        yield value.__name__
    elif isinstance(value, dict) and depth < 4:
        for key, inner in value.items():
            # an option that is switched off is not used
            if inner is not None and inner is not False:
                yield f"{key}="
                yield from _words(inner, depth + 1)
    elif isinstance(value, (list, tuple, set)) and depth < 4:
        for inner in value:
            yield from _words(inner, depth + 1)
    elif value is not None:
        yield type(value).__name__
        if type(value).__name__ in CONFIGS:
            yield from _words(vars(value), depth + 1)


def _source(item: Any) -> str:
    """Return the text of a test and of the fixtures that it asks for."""
    asked = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
    functions = [item.function, *(definitions[-1].func for definitions in asked.values())]
    found = []
    for function in functions:
        try:
            if "peft_suite" not in inspect.getfile(function) and "site-packages" not in inspect.getfile(function):
                found.append(inspect.getsource(function))
        except (OSError, TypeError):
            continue
    return "\n".join(found)


def _helpers(item: Any, source: str) -> Iterator[str]:
    """Iterate over the texts of the methods that a test of a class calls."""
    for name in dict.fromkeys(re.findall(r"self\.(\w+)\(", source)):
        try:
            yield inspect.getsource(getattr(item.cls, name))
        except (AttributeError, OSError, TypeError):
            continue


def needs_of(item: Any) -> list[str]:
    """Return the methods (``LORA``) and features (``pissa``) that a collected test uses, sorted."""
    name = item.path.name
    found = {FILES[name]} if name in FILES else set()
    params = dict(getattr(getattr(item, "callspec", None), "params", {}))
    given = {word for value in params.values() for word in _words(value)}
    if name == "test_mixed.py":  # `test_target_first_layer_1_Lora_LoKr`
        given |= {f"{word}Config" for word in item.name.split("_")}
    configs = {CONFIGS[word] for word in given if word in CONFIGS}
    text = "\n".join(given) + "\n" + item.name
    source = _source(item)
    if not configs:  # a parametrised test names many configs in its branches, and uses one
        for said in (source, *_helpers(item, source)):  # those of its class count where the test itself names none
            text += "\n" + said
            configs |= {CONFIGS[word] for word in _CONFIG.findall(item.name + "\n" + said) if word in CONFIGS}
            if configs:
                break
    found |= configs
    found |= {feature for feature, pattern in FEATURES.items() if re.search(pattern, text)}
    return sorted(found)
