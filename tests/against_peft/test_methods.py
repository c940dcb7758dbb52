"""Every method on every layer that PEFT supports: names, shapes, outputs, gradients, merged weights."""

from __future__ import annotations

import peft
import pytest
import torch
from rotating_methods import ROWS
from structured_methods import ROWS as STRUCTURED
from structured_methods import WRONG_INPUT_GRADIENT
from trained_tables import NOT_MERGED, TRAINED
from twins import LAYERS, Twins, close
from variant_tables import VARIANTS

T = {"target_modules": ["layer"]}
CONVS = ["conv1d", "conv2d", "conv2d_grouped", "conv3d", "conv3d_grouped"]


def lora(**fields):
    return peft.LoraConfig(r=4, lora_alpha=6, **T, **fields)


def ia3(feedforward=False, **fields):
    return peft.IA3Config(**T, feedforward_modules=["layer"] if feedforward else [], **fields)


def loha(**fields):
    return peft.LoHaConfig(r=3, alpha=5, **T, **fields)


def oft(r=0, block=4, **fields):
    return peft.OFTConfig(r=r, oft_block_size=block, **T, **fields)


def vera(**fields):
    return peft.VeraConfig(r=5, projection_prng_key=3, **T, **fields)


def pvera(**fields):
    return peft.PveraConfig(r=5, projection_prng_key=3, **T, **fields)


def randlora(**fields):
    return peft.RandLoraConfig(r=3, randlora_alpha=12, projection_prng_key=3, **T, **fields)


def vblora(**fields):
    return peft.VBLoRAConfig(r=3, num_vectors=6, vector_length=4, **T, **fields)


def unilora(**fields):
    return peft.UniLoraConfig(r=3, theta_d_length=11, **T, **fields)


def tinylora(**fields):
    return peft.TinyLoraConfig(u=5, **T, **fields)


def fourier(**fields):
    return peft.FourierFTConfig(n_frequency=20, **T, **fields)


def norm():
    return peft.LNTuningConfig(**T)


def tokens(**fields):
    return peft.TrainableTokensConfig(token_indices=[7, 2, 5], **T, **fields)


IA3_LAYERS = ["linear", "linear_nobias", "conv1d_hf", "conv2d", "conv2d_dilated", "conv2d_pointwise", "conv3d"]
LOHA_LAYERS = ["linear", *CONVS[:3], "conv1d_dilated", "conv2d_dilated", "conv1d_pointwise", "conv2d_pointwise"]
LN_LAYERS = [
    *["layernorm", "layernorm_two_axes", "rmsnorm", "groupnorm", "batchnorm", "embedding", "linear", "linear_nobias"],
    *["conv1d_hf", *CONVS],
]
# (name, config, layers)
TABLE = [
    ("lora", lora, ["linear", "conv1d_hf", *CONVS, "embedding"]),
    ("lora_rs", lambda: lora(use_rslora=True), ["linear"]),
    ("lora_bias", lambda: lora(lora_bias=True), ["linear", "conv2d"]),
    ("dora", lambda: lora(use_dora=True), ["linear", "conv1d_hf", "conv1d", "conv2d", "conv3d", "embedding"]),
    ("ia3", ia3, IA3_LAYERS),
    ("ia3_feedforward", lambda: ia3(True), IA3_LAYERS),
    ("ia3_random", lambda: ia3(init_ia3_weights=False), ["linear"]),
    ("loha", loha, LOHA_LAYERS),
    ("loha_random", lambda: loha(init_weights=False), ["linear"]),
    ("loha_patterns", lambda: loha(rank_pattern={"layer": 2}, alpha_pattern={"layer": 7}), ["linear"]),
    ("oft", oft, ["linear", "conv2d_pointwise", "embedding", "embedding_padding"]),
    ("oft_r", lambda: oft(r=2, block=0), ["linear", "conv2d_pointwise", "embedding"]),
    ("oft_adjusted", lambda: oft(block=5), ["linear", "wide"]),
    ("oft_cayley", lambda: oft(use_cayley_neumann=False), ["linear", "embedding"]),
    *[(f"oft_terms_{n}", lambda n=n: oft(num_cayley_neumann_terms=n), ["linear"]) for n in (2, 3, 4, 6, 8)],
    ("oft_shared", lambda: oft(block_share=True), ["linear", "conv2d_pointwise", "embedding"]),
    ("oft_coft", lambda: oft(coft=True, eps=0.4), ["linear"]),
    ("oft_random", lambda: oft(init_weights=False), ["linear"]),
    ("vera", vera, ["linear", "linear_nobias", "conv1d_hf"]),
    ("vera_random", lambda: vera(init_weights=False), ["linear"]),
    ("pvera", pvera, ["linear", "linear_nobias", "conv1d_hf"]),
    ("pvera_random", lambda: pvera(init_weights=False), ["linear"]),
    ("randlora", randlora, ["linear", "linear_nobias", "wide", "conv1d_hf"]),
    ("randlora_sparse", lambda: randlora(sparse=True), ["linear"]),
    ("randlora_very_sparse", lambda: randlora(very_sparse=True), ["wide"]),
    ("randlora_random", lambda: randlora(init_weights=False), ["linear"]),
    ("vblora", vblora, ["linear", "linear_nobias", "wide", "conv1d_hf"]),
    ("vblora_three", lambda: vblora(topk=3), ["linear"]),
    ("unilora", unilora, ["linear", "linear_nobias", "conv1d_hf"]),
    ("unilora_random", lambda: unilora(init_weights=False, proj_seed=5), ["linear"]),
    ("tinylora", tinylora, ["linear", "linear_nobias", "wide", "conv1d_hf", "embedding"]),
    ("tinylora_uniform", lambda: tinylora(r=20, init_weights="uniform", init_v_bound=0.5), ["linear", "embedding"]),
    ("fourier", fourier, ["linear", "conv1d_hf"]),
    ("fourier_zero", lambda: fourier(init_weights=True, random_loc_seed=5), ["linear"]),
    ("fourier_pattern", lambda: fourier(n_frequency_pattern={"layer": 9}), ["linear"]),
    *ROWS,
    *STRUCTURED,
    *TRAINED,
    *VARIANTS,
    ("norm", norm, LN_LAYERS),
    ("tokens", tokens, ["embedding", "linear_nobias"]),
    ("tokens_random", lambda: tokens(init_weights=False), ["embedding"]),
]
CELLS = [pytest.param(make, layer, id=f"{name}-{layer}") for name, make, layers in TABLE for layer in layers]
UNMERGED = {"beft-linear_nobias", "lora-conv2d_grouped", "lora-conv3d_grouped", *NOT_MERGED}
every_cell = pytest.mark.parametrize(("make", "layer"), CELLS)


@every_cell
def test_names_shapes_and_gradient_flags(make, layer):
    twins = Twins(LAYERS[layer], make())
    ours = {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in twins.ours.named_parameters()}
    assert ours == {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in twins.their_parameters().items()}


@every_cell
def test_outputs_and_gradients(make, layer):
    twins = Twins(LAYERS[layer], make()).equalise()
    expected, gradients = twins.run(twins.theirs)
    found, mine = twins.run(twins.ours)
    close(found, expected)
    assert mine.keys() == gradients.keys()
    wrong = {"x"} if isinstance(make(), WRONG_INPUT_GRADIENT) else set()
    for name in gradients.keys() - wrong:
        close(mine[name], gradients[name])


@pytest.mark.parametrize(("make", "layer"), [cell for cell in CELLS if cell.id not in UNMERGED])
def test_merged_weights(make, layer):
    twins = Twins(LAYERS[layer], make()).equalise()
    theirs, ours = (dict(model.state_dict()) for model in twins.merged())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        close(ours[name], tensor)
    assert any(not torch.equal(ours[name], tensor) for name, tensor in twins.base.state_dict().items())
