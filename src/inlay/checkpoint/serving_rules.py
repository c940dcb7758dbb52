"""What vLLM, SGLang and llama.cpp's converter demand of a LoRA adapter, as lists of rules.

``docs/serving.md`` names the releases whose behaviour this is. A rule says what its server looks at, what it then does,
and how the adapter is mended; the condition that finds it is a function of :mod:`inlay.checkpoint.serving_conditions`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from inlay.checkpoint import serving_conditions as find
from inlay.checkpoint.serving_conditions import Case, Condition

__all__ = ["FINE", "REFUSED", "RULES", "WRONG", "Rule"]

REFUSED = "refused"
WRONG = "wrong result"
FINE = "fine"

EXPORT = "inlay export --serving writes it so"
MERGE = "serve the merged model: inlay merge"
NAMES = f"{MERGE} where they were trained whole; other names for LoRA's factors: {EXPORT}"
CONVERT = f"{MERGE}; or approximate it by a plain LoRA (peft's convert_to_lora)"


@dataclass(frozen=True)
class Rule:
    """One thing that a server demands.

    Attributes:
        name: a short name, the same for the same demand of several servers.
        looks_at: what the server reads.
        severity: ``refused``, or ``wrong result`` where the server serves the adapter and computes something else.
        says: what the server does.
        mend: what helps.
        condition: returns what it found, or None.
        before: the release of the server from which on the rule holds no longer.
        needs_base: whether it sees nothing without the base model's files.
    """

    name: str
    looks_at: str
    severity: str
    says: str
    mend: str
    condition: Condition
    before: str | None = None
    needs_base: bool = False


def _common(server: str, since: str = "") -> tuple[Rule, ...]:
    """What all three have in common; ``since`` says from when on a server refuses what it got wrong before."""
    return (
        Rule("method", "peft_type", REFUSED, f"{server} serves LoRA only", CONVERT, find.method),
        Rule(
            "fields", "r, lora_alpha, target_modules", REFUSED, f"{server} needs these fields",
            "write them into adapter_config.json", find.fields,
        ),
        Rule(
            "factors", "lora_A and lora_B", REFUSED, f"{server} needs both factors of each module",
            "save the adapter again", find.factors,
        ),
        Rule(
            "matrices", "shapes of the factors", REFUSED, f"{server} takes matrices only", MERGE, find.matrices,
        ),
        Rule(
            "variants", ", ".join(find.VARIANTS), WRONG, f"{server} computes a plain LoRA{since}", MERGE, find.variants,
        ),
        Rule(
            "changed base", "init_lora_weights", WRONG, f"{server} adds it to the unchanged base{since}",
            "save with path_initial_model_for_weight_conversion (PEFT), or " + MERGE, find.changed_base,
        ),
        Rule(
            "changed by hand", "inlay.json", WRONG, f"{server} does not read scales that were changed after injection",
            EXPORT, find.by_hand,
        ),
        Rule("dora", "use_dora", REFUSED, f"{server} has no DoRA", MERGE, find.dora),
        Rule("finite", "values", WRONG, f"{server} serves NaN and infinity", "train it again", find.finite),
        Rule("base", "the base model's files", REFUSED, f"{server} has no such layer", "check --base", find.in_base,
             needs_base=True),
    )  # fmt: skip


def _vllm_name(key: str) -> bool:
    return key.endswith(find.BASE_EMBEDDINGS) or re.search(r"(^|\.)(score|classifier)\.(weight|bias)$", key) is not None


VLLM = (
    *_common("vLLM", since=" before release 0.32, and refuses from then on"),
    Rule(
        "modules_to_save", "modules_to_save", REFUSED, "vLLM takes none but a score or classifier (release 0.31 on)",
        MERGE, find.saved_modules("score", "classifier"),
    ),
    Rule("bias", "bias", REFUSED, "vLLM takes no trained biases", MERGE, find.biases),
    Rule("lora_bias", "lora_bias", REFUSED, "vLLM has no bias of B", MERGE, find.lora_bias),
    Rule("tokens", "trainable_token_indices", REFUSED, "vLLM takes no trained tokens", MERGE, find.trained_tokens),
    Rule(
        "activated", "alora_invocation_tokens", REFUSED,
        "vLLM refuses activated LoRA (before release 0.32 it applied it to every token)",
        "train without alora_invocation_tokens", find.activated,
    ),
    Rule(
        "rank", "r, rank_pattern", REFUSED, "vLLM refuses ranks above --max-lora-rank (16 unless given, 512 at most)",
        "start vLLM with a larger --max-lora-rank, and give the same here", find.largest_rank(16),
    ),
    Rule(
        "patterns", "rank_pattern, alpha_pattern", WRONG, "vLLM ignores patterns before release 0.32", EXPORT,
        find.patterns(rslora=True), before="0.32",
    ),
    Rule("names", "names of the tensors", REFUSED, "vLLM refuses other names", NAMES, find.names(_vllm_name)),
    Rule(
        "embeddings", "base embeddings in the file", WRONG, "vLLM passes them over and uses the base's", MERGE,
        find.base_embeddings(find.BASE_EMBEDDINGS), needs_base=True,
    ),
)  # fmt: skip


def _sglang_targets(case: Case) -> str | None:
    targets = case.config.get("target_modules")
    if isinstance(targets, list) or targets in ("all-linear", "all"):
        return None
    return f"target_modules is {targets!r}" if "target_modules" in case.config else None


def _sglang_added_tokens(case: Case) -> str | None:
    vocabulary = case.base.text_config.get("vocab_size") if case.base is not None else None
    added = [
        token
        for token, index in case.adapter.added_tokens.items()
        if not (isinstance(vocabulary, int) and isinstance(index, int) and index < vocabulary)
    ]
    return find.some(map(repr, added))


def _sglang_overrides(case: Case) -> str | None:
    usual = {"rank_pattern": case.adapter.rank, "alpha_pattern": case.adapter.alpha}
    return find.some(
        f"{name} gives {key!r} {value}"
        for name, default in usual.items()
        for key, value in case.adapter.pattern(name).items()
        if value != default
    )


# projections that SGLang stacks into one: what each needs beside it
PARTNERS = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}
# layers outside the numbered ones that SGLang reads, under the names that target_modules may call them
SGLANG_EMBEDDINGS = {
    "embed_tokens": {"embed_tokens", "vocab_emb", "embeddings", "word_embeddings"},
    "lm_head": {"lm_head", "output", "unembed_tokens"},
}


def _sglang_partners(case: Case) -> str | None:
    base = case.base if case.base is not None and case.base.files else None
    missing = []
    for module in case.adapter.pairs:
        before, _, last = module.rpartition(".")
        for partner in PARTNERS.get(last, ()) if find.in_layer(module) else ():
            path = f"{before}.{partner}"
            if path not in case.adapter.pairs and (base is None or base.module(path) is not None):
                missing.append(f"{module} without {partner}")
    return find.some(missing)


def _sglang_left_out(case: Case) -> str | None:
    targets = case.config.get("target_modules")
    named = {name.rpartition(".")[2] for name in targets} if isinstance(targets, list) else None
    read = {name for name, others in SGLANG_EMBEDDINGS.items() if named is None or named & others}
    outside = [module for module in case.adapter.pairs if not find.in_layer(module)]
    unread = [m for m in outside if m.rpartition(".")[2].replace("unembed_tokens", "lm_head") not in read]
    others = [key for key in case.adapter.others if not find.in_layer(key)]
    return find.some([*unread, *(key for key in others if not key.endswith(find.BASE_EMBEDDINGS))])


SGLANG = (
    *_common("SGLang"),
    Rule(
        "targets", "target_modules", REFUSED, "SGLang takes a list of names, 'all-linear' or 'all'", EXPORT,
        _sglang_targets,
    ),
    Rule("added tokens", "added_tokens.json", REFUSED, "SGLang refuses adapters that add tokens", MERGE,
         _sglang_added_tokens),
    Rule(
        "rank", "r", REFUSED, "SGLang refuses ranks above --max-lora-rank",
        "start SGLang with a larger --max-lora-rank, and give the same here", find.largest_rank(None),
    ),
    Rule("ranks", "shapes of the factors", REFUSED, "SGLang needs rank r everywhere", EXPORT, find.ranks),
    Rule("rslora", "use_rslora", WRONG, "SGLang scales by alpha / r and ignores use_rslora", EXPORT, find.rslora),
    Rule(
        "patterns", "rank_pattern, alpha_pattern", WRONG,
        "SGLang 0.5.23 ignores patterns, and newer sources refuse them", EXPORT, _sglang_overrides,
    ),
    Rule("activated", "alora_invocation_tokens", WRONG, "SGLang applies it to every token",
         "train without alora_invocation_tokens", find.activated),
    Rule("parameters", "target_parameters", REFUSED, "SGLang does not know their layout", MERGE, find.parameters),
    Rule(
        "names", "names of the tensors in layers", REFUSED, "SGLang refuses other names", NAMES,
        find.names(lambda key: not find.in_layer(key)),
    ),
    Rule("left out", "tensors outside layers.N", WRONG, "SGLang leaves them out without a word", MERGE,
         _sglang_left_out),
    Rule(
        "partners", "q, k, v and gate, up", REFUSED, "SGLang stacks these and needs both",
        "adapt q_proj and v_proj together, and gate_proj with up_proj", _sglang_partners,
    ),
    Rule(
        "embeddings", "base embeddings in the file", WRONG, "SGLang passes them over and uses the base's", MERGE,
        find.base_embeddings(find.BASE_EMBEDDINGS), needs_base=True,
    ),
)  # fmt: skip


def _named_base(case: Case) -> str | None:
    named = case.config.get("base_model_name_or_path")
    return None if named or case.base is not None else f"base_model_name_or_path is {named!r}"


def _architecture(case: Case) -> str | None:
    if case.base is None or case.base.text_config.get("architectures") or case.base.config.get("architectures"):
        return None
    return f"{case.base.folder}/config.json names no architectures"


def _zero_alpha(case: Case) -> str | None:
    return "lora_alpha is 0" if case.adapter.alpha == 0 else None


def _tied_head(case: Case) -> str | None:
    heads = [module for module in case.adapter.pairs if module.rpartition(".")[2] == "lm_head"]
    return find.some(heads) if case.base is not None and case.base.tied else None


def _norm(key: str) -> bool:
    return "_layernorm" in key or ".norm" in key


def _norms(case: Case) -> str | None:
    return find.some(key for key in case.adapter.others if _norm(key))


LLAMA_CPP = (
    *_common("llama.cpp"),
    Rule(
        "base name", "base_model_name_or_path", REFUSED, "the converter needs the base model's config.json",
        "name the base: inlay export --serving --base-name NAME; or give its folder: --base", _named_base,
    ),
    Rule("architecture", "config.json of the base", REFUSED, "the converter needs architectures",
         "give the folder of the base model as it was published", _architecture, needs_base=True),
    Rule("rslora", "use_rslora", WRONG, "llama.cpp scales by alpha / rank", EXPORT, find.rslora),
    Rule(
        "patterns", "alpha_pattern", WRONG, "llama.cpp scales by lora_alpha / rank of each module's tensors", EXPORT,
        find.patterns(own_ranks=True),
    ),
    Rule("alpha", "lora_alpha", WRONG, "llama.cpp takes an alpha of 0 for a scale of 1", EXPORT, _zero_alpha),
    Rule("parameters", "target_parameters", REFUSED, "the converter does not know their layout", MERGE,
         find.parameters),
    Rule(
        "names", "names of the tensors", REFUSED, "the converter stops at other names", NAMES,
        find.names(lambda key: ".base_layer.weight" in key or _norm(key)),
    ),
    Rule("norms", "tensors of norms", WRONG, "llama.cpp passes trained norms over", MERGE, _norms),
    Rule("tied head", "lm_head", REFUSED, "the base has no output embedding of its own in GGUF",
         "train without lm_head, or " + MERGE, _tied_head, needs_base=True),
    Rule(
        "embeddings", "base embeddings in the file", WRONG, "the converter passes them over", MERGE,
        find.base_embeddings((".base_layer.weight",)), needs_base=True,
    ),
)  # fmt: skip

RULES: dict[str, tuple[Rule, ...]] = {"vllm": VLLM, "sglang": SGLANG, "llama.cpp": LLAMA_CPP}
