"""Rows of ``test_methods.TABLE``: methods whose update is a structured matrix, or sparse."""

from __future__ import annotations

from functools import partial

import peft

T = {"target_modules": ["layer"]}

lokr = partial(peft.LoKrConfig, r=1, alpha=3, **T)
c3a = partial(peft.C3AConfig, block_size=4, **T)
gralora = partial(peft.GraloraConfig, r=4, alpha=6, **T)
miss = partial(peft.MissConfig, r=4, **T)
waveft = partial(peft.WaveFTConfig, n_frequency=20, scaling=2.0, **T)
shira = partial(peft.ShiraConfig, r=2, **T)
delora = partial(peft.DeloraConfig, r=3, **T)

LINEAR = ["linear", "linear_nobias"]
CONVS = ["conv1d", "conv1d_pointwise", "conv2d", "conv2d_dilated", "conv2d_grouped", "conv2d_pointwise"]

ROWS = [
    ("lokr", lokr, [*LINEAR, "wide", *CONVS]),
    ("lokr_whole", partial(lokr, r=8), ["linear", "conv1d", "conv1d_pointwise", "conv2d"]),
    ("lokr_both", partial(lokr, decompose_both=True), ["linear", "conv2d"]),
    ("lokr_factor", partial(lokr, decompose_factor=3), ["linear", "wide", "conv2d"]),
    ("lokr_effective", partial(lokr, use_effective_conv2d=True), ["conv2d", "conv2d_pointwise"]),
    ("lokr_lycoris", partial(lokr, init_weights="lycoris"), ["linear", "conv2d"]),
    ("lokr_random", partial(lokr, init_weights=False), ["linear"]),
    ("lokr_patterns", partial(lokr, rank_pattern={"layer": 2}, alpha_pattern={"layer": 7}), ["linear"]),
    ("c3a", c3a, LINEAR),
    ("c3a_zero", partial(c3a, init_weights=True), ["linear"]),
    ("c3a_pattern", partial(c3a, block_size_pattern={"layer": 2}), ["wide"]),
    ("gralora", gralora, [*LINEAR, "conv1d_hf"]),
    ("gralora_4", partial(gralora, r=8, gralora_k=4), ["linear", "wide"]),
    ("gralora_hybrid", partial(gralora, hybrid_r=3), ["linear", "conv1d_hf"]),
    ("gralora_random", partial(gralora, init_weights=False), ["linear"]),
    ("miss", miss, LINEAR),
    ("miss_rest", partial(miss, r=5), ["linear", "wide"]),
    ("miss_random", partial(miss, init_weights=False), ["linear"]),
    ("miss_bat", partial(miss, init_weights="bat"), ["linear", "wide"]),
    ("miss_mini", partial(miss, r=5, mini_r=4, init_weights="mini"), ["linear", "wide"]),
    *[(f"waveft_{w}", partial(waveft, wavelet_family=w), ["linear", "wide"]) for w in ("db1", "db4", "sym5", "coif2")],
    ("waveft_hf", waveft, ["conv1d_hf"]),
    ("waveft_entries", partial(waveft, use_idwt=False), ["linear", "conv1d_hf"]),
    ("waveft_random", partial(waveft, init_weights=False, random_loc_seed=5), ["linear"]),
    ("waveft_share", partial(waveft, proportional_parameters=True), ["linear"]),
    ("shira", shira, LINEAR),
    ("shira_seed", partial(shira, random_seed=5, init_weights=False), ["linear"]),
    ("delora", delora, LINEAR),
    ("delora_patterns", partial(delora, rank_pattern={"layer": 2}, lambda_pattern={"layer": 7}), ["wide"]),
    ("delora_random", partial(delora, init_weights=False), ["linear"]),
]
# PEFT's own backward of these gives the input another gradient than its forward has; test_structured_differences.py
WRONG_INPUT_GRADIENT = (peft.C3AConfig,)

# (name, config) with random starts; layers of some size
DRAWN = [
    ("lokr", partial(lokr, r=10, init_weights=False)),
    ("c3a", partial(c3a, block_size=20)),
    ("c3a_gaussian", partial(c3a, block_size=20, init_weights="gaussian")),
    ("c3a_kaiming", partial(c3a, block_size=20, init_weights="kaiming_uniform")),
    ("gralora", partial(gralora, r=20, hybrid_r=10, init_weights=False)),
    ("miss", partial(miss, r=40, init_weights=False)),
    ("waveft", partial(waveft, n_frequency=2000, init_weights=False)),
    ("shira", partial(shira, init_weights=False)),
    ("delora", partial(delora, r=20, init_weights=False)),
]

LAYERS = {"target_modules": ["lin", "wide"]}
SAVED = {
    "lokr": lambda: peft.LoKrConfig(r=1, decompose_both=True, target_modules=["lin", "wide", "conv"]),
    "lokr_whole": lambda: peft.LoKrConfig(r=4, target_modules=["lin", "conv"]),
    "c3a": lambda: peft.C3AConfig(block_size=4, **LAYERS),
    "gralora": lambda: peft.GraloraConfig(r=4, hybrid_r=2, **LAYERS),
    "miss": lambda: peft.MissConfig(r=3, **LAYERS),
    "miss_bat": lambda: peft.MissConfig(r=4, init_weights="bat", **LAYERS),
    "miss_mini": lambda: peft.MissConfig(r=4, mini_r=2, init_weights="mini", **LAYERS),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=6, wavelet_family="db3", **LAYERS),
    "shira": lambda: peft.ShiraConfig(r=2, random_seed=3, **LAYERS),
    "delora": lambda: peft.DeloraConfig(r=3, **LAYERS),
}
# PEFT holds these in no state dict of the model, only in a checkpoint
NOT_IN_MEMORY = ("shira_indices",)
