"""Lines of the tables of methods that look at the base weight, at the batch, or that change while they train."""

from __future__ import annotations

from typing import Any

import peft

T = {"target_modules": ["layer"]}


def adalora(**fields: Any) -> Any:
    return peft.AdaLoraConfig(**{"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 20, **T, **fields})


# (name, config, layers)
TRAINED = [
    ("adalora", adalora, ["linear", "linear_nobias", "conv1d_hf", "conv2d", "conv2d_dilated"]),
    ("adalora_random", lambda: adalora(init_lora_weights=False, lora_alpha=-1), ["linear"]),
    (
        "adamss",
        lambda: peft.AdamssConfig(r=3, num_subspaces=3, subspace_rank=2, **T),
        ["linear", "linear_nobias", "wide"],
    ),
    ("adamss_dynamic", lambda: peft.AdamssConfig(r=5, subspace_rank=3, use_dynamic_rank=True, **T), ["linear"]),
    ("adamss_all", lambda: peft.AdamssConfig(**T), ["linear"]),
    ("frod", lambda: peft.FrodConfig(sparse_rate=0.1, progressbar=False, **T), ["linear", "linear_nobias", "wide"]),
    ("frod_hf", lambda: peft.FrodConfig(sparse_rate=0.02, progressbar=False, **T), ["conv1d_hf"]),
    ("lily", lambda: peft.LilyConfig(r=3, num_B=3, scaling=0.7, **T), ["linear", "linear_nobias", "wide"]),
    ("osf", lambda: peft.OSFConfig(**T), ["linear", "linear_nobias", "wide"]),
    ("osf_rank", lambda: peft.OSFConfig(effective_rank=0.4, rank_pattern={"lay": 5}, **T), ["linear"]),
    ("supertuning", lambda: peft.SupertuningConfig(sparsity=0.7, **T), ["linear", "linear_nobias"]),
    ("supertuning_supra", lambda: peft.SupertuningConfig(sparsity=0.7, select_top=False, r=2, **T), ["linear"]),
]
# Lily depends on the data; PEFT merges no copy of an OSF model rightly
NOT_MERGED = {f"{name}-{layer}" for name, _, layers in TRAINED if name[:3] in ("lil", "osf") for layer in layers}

TWO = {"target_modules": ["lin", "wide"]}
SAVED_TRAINED = {
    "adalora": lambda: adalora(target_modules=["lin", "wide", "conv"]),
    "adamss": lambda: peft.AdamssConfig(r=3, num_subspaces=3, subspace_rank=2, **TWO),
    "frod": lambda: peft.FrodConfig(sparse_rate=0.1, progressbar=False, **TWO),
    "frod_regenerated": lambda: peft.FrodConfig(sparse_rate=0.1, progressbar=False, save_projection=False, **TWO),
    "lily": lambda: peft.LilyConfig(r=3, num_B=3, **TWO),
    "osf": lambda: peft.OSFConfig(**TWO),
    "supertuning": lambda: peft.SupertuningConfig(sparsity=0.7, r=2, **TWO),
    "supertuning_regenerated": lambda: peft.SupertuningConfig(sparsity=0.7, save_precomputed_indices=False, **TWO),
}
