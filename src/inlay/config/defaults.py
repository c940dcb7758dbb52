"""Which modules a method adapts when it is not told, by model family. Data; the families and modules are PEFT's."""

from __future__ import annotations

from typing import Any

__all__ = ["default_feedforward", "default_targets", "families"]

Targets = dict[str, "list[str] | str"]


def _table(groups: dict[str, str]) -> Targets:
    """Turn ``{modules: families}``, names between spaces, into ``{family: [module, ...]}``."""
    return {family: modules.split() for modules, members in groups.items() for family in members.split()}


def _only(table: Targets, members: str) -> Targets:
    return {family: table[family] for family in members.split()}


# A multimodal model: only the projections of its language part, hence a pattern.
_GEMMA4: Targets = {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}

# Query and value projections, the choice of the LoRA paper; most methods follow it.
_BASE: Targets = {
    **_table(
        {
            "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text "
            "qwen2 qwen3",
            "q_proj k_proj v_proj o_proj": "nemotron_h",
            "q_proj v_proj fc1 fc2": "phi",
            "q v": "t5 mt5",
            "q v q_proj v_proj": "blip-2",
            "query value": "bert roberta xlm-roberta electra layoutlm",
            "query_proj value_proj": "deberta-v2",
            "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
            "qkv_proj": "codegen",
            "in_proj": "deberta",
            "c_attn": "gpt2 gpt_bigcode",
            "c_proj c_attn": "btlm",
            "Wqkv": "mpt",
            "key value receptance output": "rwkv",
            "r_proj k_proj v_proj o_proj key value": "rwkv7",
        }
    ),
    **_GEMMA4,
}

# Where single methods depart from the base table.
_GPT2_MLP = _table({"mlp.c_proj": "gpt2 gpt_bigcode"})
_PHI_ATTENTION = _table({"q_proj v_proj": "phi"})
_VIT = _table({"query value": "vit"})
_DINO = _table({"query value": "dinov2"})

# Methods that give rank away or share it, and so start from more matrices.
_WIDE: Targets = {
    **_only(
        _BASE,
        "gpt2 bloom gptj gpt_neox gpt_neo llama llama4 bert roberta gpt_bigcode deberta gemma gemma2 gemma3_text "
        "gemma4 qwen2 qwen3 nemotron_h",
    ),
    **_table(
        {
            "q k v o wi wo": "t5",
            "q k v o wi_0 wi_1 wo": "mt5",
            "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
            "query_proj key_proj value_proj dense": "deberta-v2",
        }
    ),
}

_LLAMA_LIKE = "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3"

# Keys and values, and the matrix that closes the feed-forward block; the latter are listed again in _FEEDFORWARD.
_IA3 = _table(
    {
        "k_proj v_proj down_proj": "llama mistral",
        "k_proj v_proj w2": "mixtral",
        "q_proj v_proj down_proj": "llama4 gemma gemma2 gemma3_text qwen2 qwen3",
        "q_proj v_proj fc2": "bart phi",
        "q_proj k_proj fc2": "opt",
        "q_proj v_proj fc_out": "gptj",
        "q_proj v_proj c_proj": "gpt_neo",
        "k v wo": "t5",
        "k v wi_1": "mt5",
        "key value output.dense": "bert roberta",
        "key_proj value_proj output.dense": "deberta-v2",
        "in_proj output.dense": "deberta",
        "query_key_value mlp.dense_4h_to_h": "bloom",
        "query_key_value dense_4h_to_h": "gpt_neox RefinedWebModel RefinedWeb falcon",
        "c_attn mlp.c_proj": "gpt2 gpt_bigcode",
    }
)
# The last of IA3's targets is the feed-forward one, except in mT5, for which PEFT lists none.
_FEEDFORWARD: dict[str, list[str]] = {
    family: [] if family == "mt5" else [targets[-1]] for family, targets in _IA3.items()
}

_VALUES = _table(
    {
        "v_proj": "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
        "v": "t5 mt5",
        "value": "bert roberta",
        "value_proj": "deberta-v2",
    }
)

_NORMS = _table(
    {
        "input_layernorm post_attention_layernorm norm": "llama mistral gemma",
        "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm norm": "gemma2 "
        "gemma3_text",
        "input_layernorm post_attention_layernorm ln_f": "bloom falcon",
        "input_layernorm final_layernorm": "phi",
        "post_attention_layernorm": "qwen2 qwen3",
        "layer_norm final_layer_norm": "t5 mt5",
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        "layernorm LayerNorm final_layer_norm self_attn_layer_norm": "blip-2",
        "ln_1 ln_2 ln_f": "gpt2",
        "ln_1 ln_f": "gptj",
        "multi_modal_projector input_layernorm post_attention_layernorm norm embed_tokens lm_head": "llava",
    }
)

# Full-rank training inside a subspace: every projection of a block.
_EVERY_PROJECTION = _table(
    {
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": f"{_LLAMA_LIKE} phi",
        "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
        "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        "query_key_value dense_4h_to_h": "bloom gpt_neox falcon",
        "c_attn c_proj": "gpt2 gpt_bigcode",
    }
)

_SAME_AS_BASE = (
    "BOFT DEFT DELORA GLORA GRALORA HIRA HRA LILY LOHA LOKR LORA MISS OFT PEANUT POLY PSOFT RANDLORA ROAD SUPERTUNING "
    "TINYLORA UNILORA"
)

_TARGETS: dict[str, Targets] = {
    **dict.fromkeys(_SAME_AS_BASE.split(), _BASE),
    "ADALORA": {**_WIDE, **_table({"query key value dense": "roberta"})},
    "ADAMSS": {**_BASE, **_VIT},
    "BEFT": _VALUES,
    "C3A": {**_BASE, **_GPT2_MLP},
    "FOURIERFT": {**_BASE, **_GPT2_MLP},
    "FROD": {**_BASE, **_PHI_ATTENTION, **_VIT},
    "IA3": _IA3,
    "LN_TUNING": _NORMS,
    "OSF": _EVERY_PROJECTION,
    "PVERA": {**_BASE, **_PHI_ATTENTION, **_DINO},
    "SHIRA": {**_BASE, **_PHI_ATTENTION},
    "VBLORA": _WIDE,
    "VERA": {**_BASE, **_PHI_ATTENTION},
    "WAVEFT": {
        **{family: targets for family, targets in _BASE.items() if family not in ("btlm", "rwkv", "rwkv7")},
        **_GPT2_MLP,
    },
}


def default_targets(peft_type: Any, model_type: str) -> list[str] | str | None:
    """Return what a method adapts in a model family when ``target_modules`` is not given.

    Args:
        peft_type: a `PeftType` or its name.
        model_type: ``model.config.model_type`` of transformers, such as ``"llama"``.

    Returns:
        Module names, or a regular expression over whole names, or None where there is no default. The list is the
        caller's own.
    """
    found = _TARGETS.get(str(getattr(peft_type, "value", peft_type)), {}).get(model_type)
    return list(found) if isinstance(found, list) else found


def default_feedforward(model_type: str) -> list[str] | None:
    """Return which of IA3's default targets belong to the feed-forward block (and scale their input), or None."""
    found = _FEEDFORWARD.get(model_type)
    return None if found is None else list(found)


def families(peft_type: Any) -> list[str]:
    """Return the model families for which `default_targets` knows an answer, sorted."""
    return sorted(_TARGETS.get(str(getattr(peft_type, "value", peft_type)), {}))
