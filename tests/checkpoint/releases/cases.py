"""What is saved by each release: a configuration per case, and the first release that has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """One adapter folder.

    Attributes:
        since: the first release that offers this.
        config: name of the configuration's class, and its fields.
        base: the model of ``bases.py``.
        save: keywords of ``save_pretrained``.
        names: names of the adapters, the first of which is active.
        until: the last release that takes this configuration.
        form: ``saved`` by ``save_pretrained``; ``compiled``, the same of a model that was compiled before; ``raw``, the
            trained part of ``state_dict()``, as scripts write it; ``parallel``, ``get_peft_model_state_dict`` of the
            state dict of a ``DataParallel``, likewise.
        merged: the model answers after merging, because the release runs the layer in another way before.
    """

    since: str
    config: tuple[str, dict[str, Any]]
    base: str = "net"
    save: tuple[tuple[str, Any], ...] = ()
    names: tuple[str, ...] = ("default",)
    until: str = "9.9.9"
    form: str = "saved"
    merged: bool = False


def lora(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "LoraConfig", {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0, "target_modules": ["lin", "wide"], **fields}


SAFE, BIN = (("safe_serialization", True),), (("safe_serialization", False),)

CASES: dict[str, Case] = {
    "lora": Case("0.3.0", lora()),
    "lora_bin": Case("0.4.0", lora(), save=BIN),
    "lora_safetensors": Case("0.4.0", lora(), save=SAFE),
    "lora_other_name": Case("0.3.0", lora(), names=("other",)),
    "lora_two": Case("0.3.0", lora(), names=("default", "second")),
    "lora_compiled": Case("0.3.0", lora(modules_to_save=["head"]), form="compiled"),
    "lora_raw": Case("0.3.0", lora(modules_to_save=["head"]), form="raw"),
    "lora_parallel": Case("0.3.0", lora(), form="parallel"),
    "lora_parallel_head": Case("0.3.0", lora(modules_to_save=["head"]), form="parallel", until="0.14.0"),
    "lora_regex": Case("0.3.0", lora(target_modules="lin|wide")),
    "lora_embedding": Case("0.3.0", lora(target_modules=["emb", "lin"])),
    "lora_conv2d": Case("0.4.0", lora(target_modules=["conv", "lin"])),
    "lora_attention": Case("0.15.2", lora(target_modules=["attention"])),
    "lora_bias_all": Case("0.3.0", lora(bias="all")),
    "lora_bias_only": Case("0.3.0", lora(bias="lora_only", target_modules=["lin", "back"])),
    "lora_head": Case("0.3.0", lora(modules_to_save=["head"])),
    "lora_norm_and_embedding": Case("0.3.0", lora(modules_to_save=["norm", "emb"])),
    "lora_patterns": Case("0.6.2", lora(rank_pattern={"wide": 3}, alpha_pattern={"lin": 5})),
    "rslora": Case("0.8.2", lora(use_rslora=True)),
    "dora": Case("0.9.0", lora(use_dora=True)),
    "dora_conv2d": Case("0.11.1", lora(use_dora=True, target_modules=["conv"])),
    "dora_embedding": Case("0.13.2", lora(use_dora=True, target_modules=["emb"])),
    "lora_own_bias": Case("0.14.0", lora(lora_bias=True)),
    "lora_exclude": Case("0.14.0", lora(target_modules=["lin", "wide"], exclude_modules=["wide"])),
    "lora_tokens": Case("0.15.2", lora(trainable_token_indices={"emb": [3, 5]})),
    "lora_parameters": Case("0.17.1", lora(target_modules=["lin"], target_parameters=["experts.up"])),
    "lora_two_parameters": Case("0.17.1", lora(target_modules=[], target_parameters=["experts.up", "experts.down"])),
    "lora_bert": Case("0.3.0", lora(target_modules=None, task_type="SEQ_CLS"), "bert"),
    "lora_gpt2": Case("0.3.0", lora(target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM"), "gpt2"),
    "lora_llama": Case("0.3.0", lora(target_modules=None, task_type="CAUSAL_LM"), "llama"),
    "lora_layers": Case(
        "0.4.0",
        lora(target_modules=["q_proj", "o_proj"], layers_to_transform=[1], layers_pattern="layers"),
        "llama",
    ),
    "lora_all_linear": Case("0.8.2", lora(target_modules="all-linear", task_type="CAUSAL_LM"), "llama"),
    "lora_replicated": Case(
        "0.10.0", lora(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]], task_type="CAUSAL_LM"), "llama"
    ),
    "ia3": Case("0.4.0", ("IA3Config", {"target_modules": ["lin", "back"], "feedforward_modules": ["back"]})),
    "ia3_conv2d": Case("0.6.2", ("IA3Config", {"target_modules": ["conv"], "feedforward_modules": []})),
    "ia3_gpt2": Case("0.4.0", ("IA3Config", {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}), "gpt2"),
    "ia3_bert": Case("0.4.0", ("IA3Config", {"task_type": "SEQ_CLS"}), "bert"),
    "loha": Case("0.6.2", ("LoHaConfig", {"r": 2, "alpha": 3, "target_modules": ["lin", "wide"]})),
    "loha_conv2d": Case("0.6.2", ("LoHaConfig", {"r": 2, "alpha": 3, "target_modules": ["conv"]})),
    "loha_effective": Case(
        "0.6.2", ("LoHaConfig", {"r": 2, "alpha": 3, "target_modules": ["conv"], "use_effective_conv2d": True})
    ),
    "loha_patterns": Case(
        "0.6.2",
        (
            "LoHaConfig",
            {"r": 2, "target_modules": ["lin", "wide"], "rank_pattern": {"wide": 3}, "alpha_pattern": {"lin": 5}},
        ),
    ),
    "oft_of_outputs": Case("0.7.1", ("OFTConfig", {"r": 2, "target_modules": ["lin", "wide"]}), until="0.15.2"),
    "oft_of_outputs_shared": Case(
        "0.7.1",
        ("OFTConfig", {"r": 2, "target_modules": ["lin"], "block_share": True, "coft": True, "eps": 0.3}),
        until="0.15.2",
    ),
    "oft": Case("0.16.0", ("OFTConfig", {"r": 2, "oft_block_size": 0, "target_modules": ["lin", "wide"]})),
    "oft_shared": Case(
        "0.16.0",
        (
            "OFTConfig",
            {"oft_block_size": 4, "target_modules": ["lin", "wide"], "block_share": True, "coft": True, "eps": 0.3},
        ),
    ),
    "oft_conv2d": Case(
        "0.16.0",
        ("OFTConfig", {"oft_block_size": 3, "target_modules": ["conv"], "use_cayley_neumann": False}),
        merged=True,
    ),
    "oft_block_size": Case("0.16.0", ("OFTConfig", {"oft_block_size": 4, "target_modules": ["lin", "wide"]})),
    "oft_neumann": Case(
        "0.16.0", ("OFTConfig", {"oft_block_size": 4, "target_modules": ["lin"], "use_cayley_neumann": True})
    ),
    "vera_one_shape": Case("0.11.1", ("VeraConfig", {"r": 3, "target_modules": ["lin"]})),
    "vera": Case("0.12.0", ("VeraConfig", {"r": 3, "target_modules": ["lin", "wide"]})),
    "vera_seeded": Case("0.11.1", ("VeraConfig", {"r": 3, "target_modules": ["lin"], "save_projection": False})),
    "fourierft": Case("0.12.0", ("FourierFTConfig", {"n_frequency": 6, "target_modules": ["lin", "wide"]})),
    "fourierft_pattern": Case(
        "0.12.0",
        ("FourierFTConfig", {"n_frequency": 6, "target_modules": ["lin", "wide"], "n_frequency_pattern": {"wide": 9}}),
    ),
    "ln_tuning": Case("0.11.1", ("LNTuningConfig", {"target_modules": ["norm"]})),
    "ln_tuning_llama": Case("0.11.1", ("LNTuningConfig", {"task_type": "CAUSAL_LM"}), "llama"),
    "trainable_tokens": Case("0.15.2", ("TrainableTokensConfig", {"token_indices": [3, 5], "target_modules": ["emb"]})),
    "tied_gpt2": Case(
        "0.18.0",
        lora(target_modules=["wte", "c_attn"], ensure_weight_tying=True, task_type="CAUSAL_LM"),
        "gpt2",
    ),
    "tied_llama": Case("0.18.0", lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True), "tied"),
    "tied_copies": Case(
        "0.18.0", lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True), "tied"
    ),
    "tied_tokens": Case("0.15.2", lora(target_modules=["q_proj"], trainable_token_indices=[3, 5]), "tied"),
    "oft_exact": Case(
        "0.16.0", ("OFTConfig", {"oft_block_size": 4, "target_modules": ["lin", "wide"], "use_cayley_neumann": False})
    ),
    "oft_two_terms": Case(
        "0.16.0", ("OFTConfig", {"oft_block_size": 4, "target_modules": ["lin"], "num_cayley_neumann_terms": 2})
    ),
    "oft_seven_terms": Case(
        "0.16.0", ("OFTConfig", {"oft_block_size": 4, "target_modules": ["lin"], "num_cayley_neumann_terms": 7})
    ),
    "oft_bias_only": Case(
        "0.16.0", ("OFTConfig", {"oft_block_size": 4, "target_modules": ["lin"], "bias": "oft_only"})
    ),
    "lora_square_parameters": Case(
        "0.17.1", lora(target_modules=[], target_parameters=["experts.square", "back.weight"])
    ),
}
