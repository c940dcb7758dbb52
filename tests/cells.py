"""Every law runs over every cell of this file: a method, a layer kind and a storage.

A new method, kind or storage is one line in ``METHODS``, ``KINDS`` or ``STORAGES``. Those that are
refused when planning, and those that cannot be merged, must be exactly the ones listed in ``REFUSED`` and
``UNMERGEABLE``, so that nothing starts or stops to work in silence.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from cell_layers import Experts, OwnRMSNorm, ScaledEmbedding, Tied, bags, hf_conv1d
from torch import Tensor, nn

from inlay.config.variants import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from inlay.core.plan import plan
from inlay.core.registry import method_class
from inlay.errors import InlayError
from inlay.methods.adalora import AdaLoraConfig
from inlay.methods.adamss import AdamssConfig
from inlay.methods.beft import BeftConfig
from inlay.methods.boft import BOFTConfig
from inlay.methods.c3a import C3AConfig
from inlay.methods.deft import DeftConfig
from inlay.methods.delora import DeloraConfig
from inlay.methods.fourierft import FourierFTConfig
from inlay.methods.frod import FrodConfig
from inlay.methods.glora import GloraConfig
from inlay.methods.gralora import GraloraConfig
from inlay.methods.hira import HiraConfig
from inlay.methods.hra import HRAConfig
from inlay.methods.ia3 import IA3Config
from inlay.methods.lily import LilyConfig
from inlay.methods.ln_tuning import LNTuningConfig
from inlay.methods.loha import LoHaConfig
from inlay.methods.lokr import LoKrConfig
from inlay.methods.lora import EvaConfig, LoftQConfig, LoraConfig
from inlay.methods.miss import MissConfig
from inlay.methods.oft import OFTConfig
from inlay.methods.osf import OSFConfig
from inlay.methods.peanut import PeanutConfig
from inlay.methods.poly import PolyConfig
from inlay.methods.psoft import PsoftConfig
from inlay.methods.pvera import PveraConfig
from inlay.methods.randlora import RandLoraConfig
from inlay.methods.road import RoadConfig
from inlay.methods.shira import ShiraConfig
from inlay.methods.supertuning import SupertuningConfig
from inlay.methods.tinylora import TinyLoraConfig
from inlay.methods.trainable_tokens import TrainableTokensConfig
from inlay.methods.unilora import UniLoraConfig
from inlay.methods.vblora import VBLoRAConfig
from inlay.methods.vera import VeraConfig
from inlay.methods.waveft import WaveFTConfig
from inlay.testing.layers import BATCH, LayerCase, Pair

# `make test-all` sets it: every law over every cell, instead of a cover of pairs.
ALL_CELLS = os.environ.get("INLAY_ALL_CELLS", "0") not in ("", "0")
Target = dict[str, Any]


def largest(layer: Any, r: int) -> Tensor:
    """A mask for SHiRA: the largest entries of a weight."""
    weight = layer.weight.detach()
    chosen = weight.abs().flatten().topk(r * sum(weight.shape)).indices
    return torch.zeros_like(weight).flatten().index_fill(0, chosen, 1.0).view_as(weight)


def masked(config: Any) -> Any:
    """Give a config of SHiRA a mask function."""
    config.mask_fn = largest
    return config


# names of the first layer, and of the last one
BLOCKS = BdLoraConfig(
    target_modules_bd_a=["first", "up", "matrix"], target_modules_bd_b=["last", "down"], nblocks=2, match_strict=False
)

# -- methods: what to adapt -> config ---------------------------------------------------------------------------------

METHODS: dict[str, Callable[[Target], Any]] = {
    "lora": lambda target: LoraConfig(r=4, lora_alpha=6, **target),
    "lora_rs": lambda target: LoraConfig(r=2, lora_alpha=3, use_rslora=True, **target),
    "lora_random": lambda target: LoraConfig(r=4, init_lora_weights=False, **target),
    "lora_gaussian": lambda target: LoraConfig(r=4, init_lora_weights="gaussian", **target),
    "lora_pissa": lambda target: LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", **target),
    "lora_pissa_niter": lambda target: LoraConfig(r=4, init_lora_weights="pissa_niter_2", **target),
    "lora_olora": lambda target: LoraConfig(r=4, lora_alpha=6, init_lora_weights="olora", **target),
    "lora_mica": lambda target: LoraConfig(r=4, lora_alpha=6, init_lora_weights="mica", **target),
    "lora_orthogonal": lambda target: LoraConfig(r=4, lora_alpha=6, init_lora_weights="orthogonal", **target),
    "lora_loftq": lambda target: LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_iter=2), **target
    ),
    "lora_eva": lambda target: LoraConfig(r=4, lora_alpha=6, init_lora_weights="eva", eva_config=EvaConfig(), **target),
    "lora_bias": lambda target: LoraConfig(r=4, lora_alpha=6, lora_bias=True, **target),
    "lora_base_bias": lambda target: LoraConfig(r=4, lora_alpha=6, bias="all", **target),
    "dora": lambda target: LoraConfig(r=4, lora_alpha=6, use_dora=True, **target),
    "dora_pissa": lambda target: LoraConfig(
        r=2, lora_alpha=3, use_dora=True, use_rslora=True, init_lora_weights="pissa", **target
    ),
    "lora_kasa": lambda target: LoraConfig(r=4, lora_alpha=6, kasa_config=KasaConfig(), **target),
    "lora_bd": lambda target: LoraConfig(r=4, lora_alpha=6, use_bdlora=BLOCKS, **target),
    "lora_qa": lambda target: LoraConfig(r=4, lora_alpha=6, use_qalora=True, qalora_group_size=2, **target),
    "lora_velora": lambda target: LoraConfig(  # so many sub-tokens are single features, and nothing is lost
        r=4, lora_alpha=6, velora_config=VeloraConfig(num_groups=40, init_type="batch_average_once"), **target
    ),
    "lora_monteclora": lambda target: LoraConfig(
        r=4, lora_alpha=6, monteclora_config=MontecloraConfig(num_samples=3), **target
    ),
    "dora_bd": lambda target: LoraConfig(r=4, use_dora=True, use_bdlora=BLOCKS, **target),
    "dora_kasa_pissa": lambda target: LoraConfig(
        r=2, lora_alpha=3, use_dora=True, kasa_config=KasaConfig(), init_lora_weights="pissa", **target
    ),
    "dora_qa_velora": lambda target: LoraConfig(
        r=4,
        use_dora=True,
        use_rslora=True,
        use_qalora=True,
        qalora_group_size=3,
        velora_config=VeloraConfig(num_groups=40),
        **target,
    ),
    "ia3": lambda target: IA3Config(feedforward_modules=[], **target),
    "ia3_input": lambda target: IA3Config(feedforward_modules=target["target_modules"], **target),
    "loha": lambda target: LoHaConfig(r=3, alpha=5, **target),
    "loha_effective": lambda target: LoHaConfig(r=3, alpha=5, use_effective_conv2d=True, **target),
    "oft": lambda target: OFTConfig(oft_block_size=4, **target),
    "oft_cayley": lambda target: OFTConfig(oft_block_size=3, use_cayley_neumann=False, **target),
    "oft_shared": lambda target: OFTConfig(oft_block_size=4, block_share=True, coft=True, eps=2.0, **target),
    "pvera": lambda target: PveraConfig(r=5, d_initial=0.7, **target),
    "randlora": lambda target: RandLoraConfig(r=3, randlora_alpha=12, **target),
    "randlora_sparse": lambda target: RandLoraConfig(r=5, randlora_alpha=20, sparse=True, **target),
    "boft": lambda target: BOFTConfig(boft_block_size=4, **target),
    "boft_butterfly": lambda target: BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, **target),
    "hra": lambda target: HRAConfig(r=4, **target),
    "hra_joint": lambda target: HRAConfig(r=3, apply_GS=True, **target),
    "road": lambda target: RoadConfig(group_size=4, **target),
    "road_2": lambda target: RoadConfig(variant="road_2", group_size=4, **target),
    "road_4": lambda target: RoadConfig(variant="road_4", group_size=2, **target),
    "hira": lambda target: HiraConfig(r=4, **target),
    "deft": lambda target: DeftConfig(r=4, alpha=6, **target),
    "deft_qr": lambda target: DeftConfig(r=3, decomposition_method="qr", **target),
    "deft_para": lambda target: DeftConfig(r=3, para=True, decomposition_method="qr", **target),
    "glora": lambda target: GloraConfig(r=4, **target),
    "glora_vector": lambda target: GloraConfig(config_A_B="vector", config_C="vector", config_D_E="vector", **target),
    "glora_constant": lambda target: GloraConfig(config_A_B="constant", config_C="none", **target),
    "psoft": lambda target: PsoftConfig(r=4, psoft_alpha=6, **target),
    "psoft_free": lambda target: PsoftConfig(
        r=3, psoft_orth=False, psoft_mag_a=False, ab_svd_init="pissa_init", **target
    ),
    "beft": lambda target: BeftConfig(**target),
    "peanut": lambda target: PeanutConfig(r=4, act_fn="silu", **target),
    "peanut_deep": lambda target: PeanutConfig(r=4, depth=2, act_fn="gelu", scaling=0.5, **target),
    "lokr": lambda target: LoKrConfig(r=1, alpha=3, decompose_both=True, init_weights="lycoris", **target),
    "lokr_whole": lambda target: LoKrConfig(r=4, alpha=6, init_weights=False, **target),
    "lokr_effective": lambda target: LoKrConfig(
        r=1, alpha=3, use_effective_conv2d=True, decompose_factor=4, init_weights="lycoris", **target
    ),
    "c3a": lambda target: C3AConfig(block_size=2, **target),
    "c3a_zero": lambda target: C3AConfig(block_size=4, init_weights=True, **target),
    "gralora": lambda target: GraloraConfig(r=4, alpha=6, **target),
    "gralora_hybrid": lambda target: GraloraConfig(r=4, hybrid_r=2, alpha=6, **target),
    "miss": lambda target: MissConfig(r=5, **target),
    "miss_mini": lambda target: MissConfig(r=4, mini_r=2, init_weights="mini", **target),
    "miss_bat": lambda target: MissConfig(r=2, init_weights="bat", **target),
    "waveft": lambda target: WaveFTConfig(n_frequency=8, scaling=4.0, wavelet_family="db2", **target),
    "waveft_entries": lambda target: WaveFTConfig(n_frequency=8, scaling=4.0, use_idwt=False, **target),
    "shira": lambda target: ShiraConfig(r=1, **target),
    "shira_masked": lambda target: masked(ShiraConfig(r=1, mask_type="largest", **target)),
    "delora": lambda target: DeloraConfig(r=5, delora_lambda=3, **target),
    "vblora": lambda target: VBLoRAConfig(r=3, num_vectors=6, vector_length=4, init_logits_std=1.0, **target),
    "unilora": lambda target: UniLoraConfig(r=3, theta_d_length=40, init_theta_d_bound=0.5, **target),
    "tinylora": lambda target: TinyLoraConfig(u=5, weight_tying=0.5, **target),
    "tinylora_apart": lambda target: TinyLoraConfig(r=3, u=4, init_weights="uniform", init_v_bound=0.5, **target),
    "vera": lambda target: VeraConfig(r=5, d_initial=0.7, **target),
    "fourierft": lambda target: FourierFTConfig(n_frequency=8, scaling=30.0, **target),
    "fourierft_zero": lambda target: FourierFTConfig(n_frequency=6, scaling=30.0, init_weights=True, **target),
    "ln_tuning": lambda target: LNTuningConfig(**target),
    "supertuning": lambda target: SupertuningConfig(sparsity=0.7, **target),
    "supertuning_supra": lambda target: SupertuningConfig(sparsity=0.8, select_top=False, r=2, **target),
    "osf": lambda target: OSFConfig(**target),
    "adalora": lambda target: AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, total_step=20, **target),
    "poly": lambda target: PolyConfig(r=2, n_skills=2, **target),
    "lily": lambda target: LilyConfig(r=3, num_B=3, scaling=0.7, **target),
    "frod": lambda target: FrodConfig(sparse_rate=0.1, **target),
    "adamss": lambda target: AdamssConfig(r=6, num_subspaces=3, subspace_rank=2, **target),
    "trainable_tokens": lambda target: TrainableTokensConfig(token_indices=[6, 2, 3], **target),
}
# methods whose fresh adapter changes the output by design
CHANGES_AT_INIT = {
    *("lora_random", "lora_loftq", "hra_joint", "deft_para", "lokr_whole", "c3a", "fourierft"),
    *("vblora", "unilora", "tinylora_apart", "lora_kasa", "dora_kasa_pissa"),
}
# methods that train base parameters, which one adapter of a model can do
TRAINS_BASE = {"lora_base_bias"}


# -- kinds: how to build the layer, and a batch for it ----------------------------------------------------------------


def token_table(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Embedding(11, 12, **options)


FEATURES = (BATCH, 3, 12)
IMAGE = (BATCH, 4, 7, 6)
TOKENS = (BATCH, 5)

KINDS: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(12, 8), FEATURES),
    "linear_nobias": LayerCase(lambda: nn.Linear(12, 8, bias=False), FEATURES),
    "conv1d_hf": LayerCase(hf_conv1d, FEATURES),
    "conv1d_strided": LayerCase(lambda: nn.Conv1d(4, 8, 3, stride=2, padding=1), (BATCH, 4, 9)),
    "conv2d": LayerCase(lambda: nn.Conv2d(4, 8, (3, 2), padding=(1, 0), bias=False), IMAGE),
    "conv2d_grouped": LayerCase(lambda: nn.Conv2d(4, 8, 3, groups=2, stride=(1, 2)), IMAGE),
    "conv2d_depthwise": LayerCase(lambda: nn.Conv2d(8, 8, 3, groups=8), (BATCH, 8, 5, 5)),
    "conv2d_dilated_reflect": LayerCase(
        lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2, padding_mode="reflect"), IMAGE
    ),
    "conv2d_same_circular": LayerCase(lambda: nn.Conv2d(4, 8, (2, 3), padding="same", padding_mode="circular"), IMAGE),
    "conv3d": LayerCase(lambda: nn.Conv3d(3, 8, 2, padding=1), (BATCH, 3, 3, 4, 2)),
    "convtranspose1d_grouped": LayerCase(
        lambda: nn.ConvTranspose1d(4, 8, 3, stride=2, padding=1, output_padding=1, groups=2), (BATCH, 4, 5)
    ),
    "convtranspose2d": LayerCase(
        lambda: nn.ConvTranspose2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (BATCH, 4, 4, 3)
    ),
    "convtranspose3d": LayerCase(lambda: nn.ConvTranspose3d(3, 8, 2, stride=2), (BATCH, 3, 2, 3, 2)),
    "embedding": LayerCase(token_table(), TOKENS, vocabulary=11),
    "embedding_padding": LayerCase(token_table(padding_idx=1), TOKENS, vocabulary=11, padding=1),
    "embedding_max_norm": LayerCase(token_table(max_norm=1.5), TOKENS, vocabulary=11),
    "embedding_scaled": LayerCase(
        lambda: ScaledEmbedding(12, 12, padding_idx=0, scale=3.5), TOKENS, vocabulary=12, padding=0
    ),
    "embedding_bag": LayerCase(bags("sum", padding_idx=1), TOKENS, 12, padding=1),
    "embedding_bag_mean": LayerCase(bags("mean"), TOKENS, vocabulary=12),
    "embedding_bag_max": LayerCase(bags("max"), TOKENS, vocabulary=12),
    "layernorm": LayerCase(lambda: nn.LayerNorm(12), FEATURES),
    "layernorm_planes": LayerCase(lambda: nn.LayerNorm((3, 4)), (BATCH, 2, 3, 4)),
    "rmsnorm": LayerCase(lambda: nn.RMSNorm(12), FEATURES),
    "rmsnorm_own": LayerCase(lambda: OwnRMSNorm(12), FEATURES),
    "attention": LayerCase(lambda: nn.MultiheadAttention(12, 2), (5, BATCH, 12), axis=1, arity=3),
    "attention_batch_first": LayerCase(
        lambda: nn.MultiheadAttention(12, 2, batch_first=True, bias=False), (BATCH, 5, 12), arity=3
    ),
    "attention_kdim": LayerCase(lambda: nn.MultiheadAttention(12, 2, kdim=4, vdim=4), (5, BATCH, 12), axis=1, arity=3),
    "experts": LayerCase(Experts, FEATURES, parameters=("up", "down")),
    "experts_transposed": LayerCase(lambda: Experts(is_transposed=True), FEATURES, parameters=("down",)),
    "parameter": LayerCase(Tied, FEATURES, parameters=("matrix",)),
    "groupnorm": LayerCase(lambda: nn.GroupNorm(2, 8), (BATCH, 8, 3, 2)),
}


# -- storages ---------------------------------------------------------------------------------------------------------

STORAGES: dict[str, torch.dtype] = {
    "plain_fp32": torch.float32,
    "plain_bf16": torch.bfloat16,
    "plain_fp16": torch.float16,
    "plain_fp64": torch.float64,
}


# -- what is refused --------------------------------------------------------------------------------------------------

# (methods, kinds, part of the sentence that says why); * stands for anything
REFUSED: list[tuple[str, str, str]] = [
    *((m, "conv2d_depthwise", "does not divide") for m in ("lora_bd", "lora_qa")),
    *((m, kind, "does not divide") for m in ("?ora_bd", "lora_qa") for kind in ("embedding", "embedding_[mp]*")),
    *(("?ora_bd", kind, "does not divide") for kind in ("conv3d", "convtranspose3d")),
    *((m, "[!e]*norm*", "does not divide") for m in ("lora_bd", "lora_qa")),
    ("lora_kasa", "[!e]*norm*", "which leaves none"),
    ("*_kasa*", "embedding_max_norm", "leaves of them"),
    ("*_velora", "embedding*", "compresses features for backward"),
    ("dora_qa_velora", "experts_transposed", "does not divide the 8 columns"),
    *(
        (m, kind, "here the layer only gets another weight")
        for m in ("*_velora", "lora_monteclora")
        for kind in ("attention", "attention_b*", "experts*", "parameter")
    ),
    ("lora_monteclora", "embedding_bag_max", "here the layer only gets another weight"),
    *((m, "[!e]*norm*", "only gets another weight") for m in ("lora_velora", "lora_monteclora")),
    ("lora", "conv2d_depthwise", "a rank that 8 divides"),
    ("lora_*", "conv2d_depthwise", "a rank that 8 divides"),
    ("lora_bias", "embedding*", "a layer that can have a bias"),
    ("lora_bias", "rmsnorm*", "no bias of its own"),
    ("lora_bias", "attention_batch_first", "no bias of its own"),
    ("lora_bias", "experts*", "a layer that can have a bias"),
    ("lora_bias", "parameter", "a layer that can have a bias"),
    ("dora*", "conv*_grouped", "crosses groups"),
    ("dora*", "conv2d_depthwise", "crosses groups"),
    ("dora*", "[!e]*norm*", "a single number has none"),
    *((m, "[!e]*norm*", "which has 1; lower r") for m in ("lora_pissa*", "lora_olora", "lora_mica", "lora_loftq")),
    *((m, "embedding_max_norm", "what the start") for m in ("?ora_pissa*", "lora_olora", "lora_loftq")),
    ("ia3_input", "[!e]*norm*", "takes back any factor on its input"),
    ("oft", "conv*_grouped", "reaches across the groups"),
    ("oft", "conv2d_depthwise", "reaches across the groups"),
    ("oft_shared", "conv*_grouped", "reaches across the groups"),
    ("oft_shared", "conv2d_depthwise", "reaches across the groups"),
    ("oft*", "[!e]*norm*", "cannot be rotated"),
    ("trainable_tokens", "conv?d_[!h]*", "rows of an embedding or of an output head"),
    ("trainable_tokens", "conv?d", "rows of an embedding or of an output head"),
    ("trainable_tokens", "convtranspose*", "rows of an embedding or of an output head"),
    ("trainable_tokens", "[!e]*norm*", "rows of an embedding or of an output head"),
    ("vblora", "conv2d_depthwise", "does not divide its 9 inputs"),
    ("vblora", "conv*_grouped", "inputs"),
    ("vblora", "embedding", "does not divide its 11 inputs"),
    ("vblora", "embedding_[mp]*", "does not divide its 11 inputs"),
    ("vblora", "[!e]*norm*", "does not divide its 1 inputs"),
    ("pvera", "[!e]*norm*", "draws noise in a forward pass"),
    *(("pvera", kind, "draws noise in a forward pass") for kind in ("attention", "attention_batch_first")),
    ("osf", "[!e]*norm*", "no singular direction to keep"),
    ("boft*", "conv*_grouped", "reaches across the groups"),
    ("boft*", "conv2d_depthwise", "reaches across the groups"),
    ("hra*", "conv*_grouped", "reaches across the groups"),
    ("hra*", "conv2d_depthwise", "reaches across the groups"),
    ("road*", "conv2d_depthwise", "reaches across the groups"),
    ("boft*", "[!e]*norm*", "cannot be rotated"),
    ("hra*", "[!e]*norm*", "cannot be rotated"),
    ("road*", "[!e]*norm*", "multiplies each feature by itself"),
    ("psoft*", "[!e]*norm*", "a rank of 1 at most"),
    ("beft", "rmsnorm*", "no bias of its own"),
    ("beft", "attention_batch_first", "no bias of its own"),
    *(("pvera", kind, "draws noise in a forward pass") for kind in ("experts*", "parameter")),
    *(("beft", kind, "no bias of its own") for kind in ("experts*", "parameter")),
    *((m, "embedding_bag_max", "here the layer only gets another weight") for m in ("pvera", "beft", "poly", "lily")),
    ("trainable_tokens", "experts*", "rows of an embedding or of an output head"),
    *(
        (method, kind, "does not divide")
        for method in ("c3a*", "gralora*", "miss_bat")
        for kind in ("conv2d_depthwise", "embedding", "embedding_[mp]*", "[!e]*norm*")
    ),
    ("c3a_zero", "conv*_grouped", "does not divide"),
    ("miss*", "[!e]*norm*", "more than the 1 columns"),
    ("shira*", "[!e]*norm*", "entries of a weight"),
    ("delora", "[!e]*norm*", "a single number has none"),
    ("shira_masked", "experts*", "chooses entries of one matrix"),
    *(
        (m, kind, "and here the layer only gets another weight")
        for m in ("poly", "lily")
        for kind in ("[!e]*norm*", "attention", "attention_b*", "experts*", "parameter")
    ),
    ("*", "attention_kdim", "holds three projections apart"),
]
# planned and run, but not written into a weight
UNMERGEABLE: list[tuple[str, str, str]] = [
    *((m, "*", "depends on the data") for m in ("poly", "lily")),
    ("lora", "conv*_grouped", "crosses them"),
    ("lora_*", "conv*_grouped", "crosses them"),
    ("beft", "linear_nobias", "no bias"),
    ("beft", "conv2d", "no bias"),
    ("beft", "embedding*", "no bias"),
    *(
        (m, "embedding_max_norm", "renormalises rows above max_norm")
        for m in METHODS
        if not m.startswith(("oft", "hra", "deft_para", "beft", "poly", "lily"))
    ),
    ("lora_bias", "linear_nobias", "no bias"),
    ("lora_bias", "conv2d", "no bias"),
]


def listed(table: list[tuple[str, str, str]], method: str, kind: str) -> str | None:
    """Return why the table refuses a method on a kind, or None."""
    return next((why for m, k, why in table if fnmatchcase(method, m) and fnmatchcase(kind, k)), None)


# -- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    method: str
    kind: str
    storage: str

    def __str__(self) -> str:
        return f"{self.method}-{self.kind}-{self.storage}"

    @property
    def case(self) -> LayerCase:
        return KINDS[self.kind]

    @property
    def dtype(self) -> torch.dtype:
        return STORAGES[self.storage]

    @property
    def unmergeable(self) -> str | None:
        return listed(UNMERGEABLE, self.method, self.kind)

    @property
    def companion(self) -> str:
        """A method for a second adapter of the same layers: one that can be merged and of another family, if any is."""
        return companion(self.method, self.kind)

    def config(self, method: str | None = None, layers: tuple[str, ...] = ("first", "last")) -> Any:
        """The config of the cell's method, or of another one, for some of the layers."""
        return METHODS[method or self.method](target(self.kind, layers))

    @property
    def axis(self) -> int:
        return self.case.axis

    @property
    def padding(self) -> int | None:
        return self.case.padding

    @property
    def fresh_changes(self) -> bool:
        return self.method in CHANGES_AT_INIT

    @property
    def renormalises(self) -> bool:
        return "max_norm" in self.kind

    @property
    def numeric(self) -> bool:
        return not method_of(self.method).detaches

    def model(self, seed: int = 0) -> Pair:
        """The base model: fixed random weights, norms too; in eval mode where the method draws noise in training."""
        model = self.case.model(self.dtype, seed)
        return model.eval() if method_of(self.method).samples else model

    def batch(self, seed: int = 1) -> Tensor:
        """Inputs for ``BATCH`` samples."""
        return self.case.batch(self.dtype, seed)


def target(kind: str, layers: Iterable[str]) -> Target:
    """Return the config fields that choose layers of a kind."""
    return KINDS[kind].target(layers)


@functools.cache
def family(method: str) -> str:
    """The peft_type that a method of this file belongs to; DoRA counts apart, it has mathematics of its own."""
    config = METHODS[method]({"target_modules": ["first"]})
    return "DORA" if getattr(config, "use_dora", False) else str(config.peft_type.value)


def method_of(method: str) -> Any:
    """The method that carries out a config of this file."""
    config = METHODS[method]({"target_modules": ["first"]})
    return method_class(config.peft_type).variant(config)(config)


def additive(method: str) -> bool:
    """Whether a method only adds to the weight; any other reads the untouched one."""
    return bool(method_of(method).additive)


@functools.cache
def refusal(method: str, kind: str) -> str | None:
    """Return the sentence with which planning refuses a method on a kind, or None."""
    cell = Cell(method, kind, "plain_fp32")
    try:
        plan(cell.model(), cell.config())
    except InlayError as error:
        return str(error)
    return None


@functools.cache
def works(method: str, kind: str) -> bool:
    """Whether planning takes a method on a kind, by the table; the tests of the cells hold the table to it."""
    return listed(REFUSED, method, kind) is None


@functools.cache
def companion(method: str, kind: str) -> str:
    """Return a method for a second adapter of a layer; see :attr:`Cell.companion`."""
    others = [m for m in METHODS if m not in (method, *TRAINS_BASE) and works(m, kind)]
    own = family(method)
    rank = {m: (listed(UNMERGEABLE, m, kind) is not None, family(m) == own) for m in others}
    return min(others, key=rank.__getitem__, default=method)


def every_cell(storages: Iterable[str] = STORAGES) -> Iterator[Cell]:
    """Every cell that works."""
    return (Cell(m, k, s) for s in storages for m in METHODS for k in KINDS if works(m, k))
