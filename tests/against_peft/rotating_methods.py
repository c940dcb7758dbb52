"""Rows of ``test_methods.TABLE``: methods that rotate, rescale, or make their update of the layer's own weight."""

from __future__ import annotations

from functools import partial

import peft

T = {"target_modules": ["layer"]}

boft = partial(peft.BOFTConfig, **T)
hra = partial(peft.HRAConfig, r=4, **T)
road = partial(peft.RoadConfig, group_size=4, **T)
hira = partial(peft.HiraConfig, r=3, **T)
deft = partial(peft.DeftConfig, r=3, **T)
glora = partial(peft.GloraConfig, r=3, **T)
psoft = partial(peft.PsoftConfig, r=4, psoft_alpha=6, **T)
beft = partial(peft.BeftConfig, **T)
peanut = partial(peft.PeanutConfig, r=4, **T)
series = partial(psoft, use_cayley_neumann=True)

LINEAR = ["linear", "linear_nobias"]
SQUARE = [*LINEAR, "wide", "conv2d_square", "conv2d_pointwise"]  # PEFT takes kernels for square, and no dilation
HIRA_LAYERS = ["conv1d_hf", "conv1d", "conv1d_dilated", "conv1d_pointwise", "conv2d", "conv2d_dilated", "conv3d"]
VECTORS = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}

ROWS = [
    ("boft", boft, SQUARE),
    ("boft_num", partial(boft, boft_block_size=0, boft_block_num=4), ["linear", "conv2d_square"]),
    ("boft_random", partial(boft, init_weights=False), ["linear"]),
    ("hra", hra, SQUARE),
    ("hra_odd", partial(hra, r=3), ["linear"]),
    ("hra_joint", partial(hra, apply_GS=True, init_weights=False), ["linear", "conv2d_square"]),
    ("hra_random", partial(hra, init_weights=False), ["linear"]),
    ("road", road, [*LINEAR, "wide"]),
    ("road_2", partial(road, variant="road_2"), ["linear"]),
    ("road_4", partial(road, variant="road_4", group_size=2), ["linear"]),
    ("road_random", partial(road, init_weights=False), ["linear"]),
    ("hira", hira, [*LINEAR, *HIRA_LAYERS, "conv2d_pointwise", "embedding", "embedding_padding"]),
    ("hira_gaussian", partial(hira, init_weights="gaussian"), ["linear"]),
    ("hira_random", partial(hira, init_weights=False), ["linear", "conv2d"]),
    ("deft", deft, [*LINEAR, "conv1d_hf"]),
    ("deft_scaled", partial(deft, alpha=7), ["linear"]),
    ("deft_qr", partial(deft, decomposition_method="qr"), LINEAR),
    ("deft_capped", partial(deft, r=9), ["linear"]),
    ("deft_para", partial(deft, para=True), ["linear"]),
    ("deft_random", partial(deft, init_weights=False, init_scale=3.0), ["linear"]),
    ("glora", glora, LINEAR),
    ("glora_vector", partial(glora, **VECTORS), LINEAR),
    ("glora_constant", partial(glora, config_A_B="constant", config_C="none"), LINEAR),
    ("glora_bias", partial(glora, config_A_B="none", config_D_E="vector"), ["linear"]),
    ("glora_random", partial(glora, init_weights=False), ["linear"]),
    ("psoft", psoft, [*LINEAR, "wide"]),
    ("psoft_pissa", partial(psoft, ab_svd_init="pissa_init"), ["linear"]),
    ("psoft_lowrank", partial(psoft, psoft_svd="lowrank", random_seed=3), ["linear"]),
    ("psoft_free", partial(psoft, psoft_orth=False), ["linear"]),
    ("psoft_plain", partial(psoft, psoft_mag_a=False, psoft_mag_b=False), ["linear"]),
    *[(f"psoft_series_{n}", partial(series, num_cayley_neumann_terms=n), ["linear"]) for n in (2, 3, 4, 6)],
    ("psoft_bounded", partial(series, cayley_neumann_eps=0.4), ["linear"]),
    ("psoft_random", partial(psoft, init_weights=False), ["linear"]),
    ("beft", beft, LINEAR),
    ("beft_random", partial(beft, init_weights=False), ["linear"]),
    ("peanut", peanut, [*LINEAR, "wide"]),
    ("peanut_deep", partial(peanut, depth=2, act_fn="gelu", scaling=0.7), ["linear"]),
    ("peanut_random", partial(peanut, depth=1, act_fn="silu", init_weights=False), ["linear"]),
]
# starts that are drawn at random
DRAWN = [
    ("boft", partial(boft, init_weights=False)),
    ("hra", partial(hra, r=6)),
    ("hra_random", partial(hra, init_weights=False)),
    ("road", partial(road, variant="road_4", init_weights=False)),
    ("hira", hira),
    ("hira_gaussian", partial(hira, init_weights="gaussian")),
    ("hira_random", partial(hira, init_weights=False)),
    ("deft", partial(deft, init_weights=False, init_scale=3.0)),
    ("glora", glora),
    ("glora_random", partial(glora, init_weights=False, config_D_E="vector")),
    ("glora_vector", partial(glora, init_weights=False, **VECTORS)),
    ("psoft", partial(psoft, r=30, init_weights=False)),
    ("beft", partial(beft, init_weights=False)),
    ("peanut", partial(peanut, r=20, depth=1)),
    ("peanut_random", partial(peanut, r=20, depth=1, init_weights=False)),
]

TWO = {"target_modules": ["lin", "wide"]}
# one adapter of each for ``test_checkpoints``
SAVED = {
    "boft": partial(peft.BOFTConfig, **TWO),
    "hra": partial(peft.HRAConfig, r=4, **TWO),
    "road": partial(peft.RoadConfig, group_size=4, **TWO),
    "hira": partial(peft.HiraConfig, r=3, target_modules=["lin", "wide", "conv", "emb"]),
    "deft": partial(peft.DeftConfig, r=3, **TWO),
    "glora": partial(peft.GloraConfig, r=3, **TWO),
    "psoft": partial(peft.PsoftConfig, r=3, **TWO),
    "psoft_lowrank": partial(peft.PsoftConfig, r=3, psoft_svd="lowrank", random_seed=5, **TWO),
    "beft": partial(peft.BeftConfig, **TWO),
    "peanut": partial(peft.PeanutConfig, r=3, depth=1, **TWO),
}
