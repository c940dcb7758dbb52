"""The methods that the other ways do not run through all that they do: each is sharded, run and merged."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from sharded_checks import Reference, assert_bitwise, assert_close, assert_gradients, checkpoint
from sharded_model import TARGETS, loss
from torch import nn

from inlay.checkpoint.state_dict import set_peft_model_state_dict
from inlay.config.variants import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from inlay.core.eject import eject
from inlay.core.merge import merge, unmerge
from inlay.core.state import State
from inlay.methods.adalora import AdaLoraConfig
from inlay.methods.adamss import AdamssConfig
from inlay.methods.beft import BeftConfig
from inlay.methods.boft import BOFTConfig
from inlay.methods.deft import DeftConfig
from inlay.methods.frod import FrodConfig
from inlay.methods.glora import GloraConfig
from inlay.methods.hira import HiraConfig
from inlay.methods.hra import HRAConfig
from inlay.methods.lily import LilyConfig
from inlay.methods.ln_tuning import LNTuningConfig
from inlay.methods.lora import LoraConfig
from inlay.methods.osf import OSFConfig
from inlay.methods.peanut import PeanutConfig
from inlay.methods.poly import PolyConfig
from inlay.methods.psoft import PsoftConfig
from inlay.methods.pvera import PveraConfig
from inlay.methods.randlora import RandLoraConfig
from inlay.methods.road import RoadConfig
from inlay.methods.supertuning import SupertuningConfig
from inlay.methods.tinylora import TinyLoraConfig
from inlay.methods.trainable_tokens import TrainableTokensConfig
from inlay.methods.unilora import UniLoraConfig
from inlay.methods.vblora import VBLoRAConfig

ALL_CELLS = os.environ.get("INLAY_ALL_CELLS", "0") not in ("", "0")
# what FSDP2 runs where not all cells run: starts that change the base, constants, tensors that layers share
FEW = ("lora_pissa", "adalora", "frod", "lily", "osf", "randlora", "tinylora", "trainable_tokens", "vblora")
BLOCKS: dict[str, Any] = {"target_modules": ["up", "down"]}

FURTHER: dict[str, Callable[[], Any]] = {
    "lora_pissa": lambda: LoraConfig(r=4, init_lora_weights="pissa", **TARGETS),
    "lora_kasa": lambda: LoraConfig(r=2, kasa_config=KasaConfig(), **TARGETS),
    "lora_qa": lambda: LoraConfig(r=4, use_qalora=True, qalora_group_size=4, **TARGETS),
    "lora_bd": lambda: LoraConfig(
        r=4,
        use_bdlora=BdLoraConfig(target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2),
        **BLOCKS,
    ),
    "lora_velora": lambda: LoraConfig(r=4, velora_config=VeloraConfig(num_groups=4), **TARGETS),
    "lora_monteclora": lambda: LoraConfig(r=4, monteclora_config=MontecloraConfig(num_samples=3), **TARGETS),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=20, **TARGETS),
    "adamss": lambda: AdamssConfig(r=6, num_subspaces=3, subspace_rank=2, **TARGETS),
    "beft": lambda: BeftConfig(**TARGETS),
    "boft": lambda: BOFTConfig(boft_block_size=4, **BLOCKS),
    "deft": lambda: DeftConfig(r=4, **TARGETS),
    "frod": lambda: FrodConfig(sparse_rate=0.1, **BLOCKS),
    "glora": lambda: GloraConfig(r=4, **TARGETS),
    "hira": lambda: HiraConfig(r=4, **TARGETS),
    "hra": lambda: HRAConfig(r=4, **TARGETS),
    "lily": lambda: LilyConfig(r=3, num_B=3, **BLOCKS),
    "ln_tuning": lambda: LNTuningConfig(**TARGETS),
    "osf": lambda: OSFConfig(**TARGETS),
    "peanut": lambda: PeanutConfig(r=4, depth=1, act_fn="silu", **TARGETS),
    "poly": lambda: PolyConfig(r=2, n_skills=2, **BLOCKS),
    "psoft": lambda: PsoftConfig(r=4, **TARGETS),
    "pvera": lambda: PveraConfig(r=4, **TARGETS),
    "randlora": lambda: RandLoraConfig(r=4, randlora_alpha=8, **TARGETS),
    "road": lambda: RoadConfig(group_size=4, **BLOCKS),
    "supertuning": lambda: SupertuningConfig(sparsity=0.7, **TARGETS),
    "supertuning_supra": lambda: SupertuningConfig(sparsity=0.8, r=2, **TARGETS),
    "tinylora": lambda: TinyLoraConfig(u=5, weight_tying=0.5, **TARGETS),
    "trainable_tokens": lambda: TrainableTokensConfig(token_indices=[1, 3], **TARGETS),
    "unilora": lambda: UniLoraConfig(r=3, theta_d_length=40, **TARGETS),
    "vblora": lambda: VBLoRAConfig(r=3, num_vectors=6, vector_length=4, init_logits_std=1.0, **BLOCKS),
}


def equal_runs(model: nn.Module, state: State, reference: Reference, x: torch.Tensor, y: torch.Tensor) -> None:
    """Initial values, loading, forward, gradients, merging and ejecting are those of the unsharded model.

    Args:
        model: sharded.
        x: what this process gets of the inputs.
        y: the output for it, unsharded.
    """
    assert_bitwise(checkpoint(model), reference.fresh)
    set_peft_model_state_dict(model, reference.saved, adapter_name="one")
    found = model(x)
    assert_close(found, y, "output")
    loss(found).backward()
    assert_gradients(model, reference.gradients, 1e-5)
    assert_bitwise(checkpoint(model), reference.saved)
    if state.records["one"].method.mergeable:
        merge(state)
        with torch.no_grad():
            assert_close(model(x), y, "merged output")
        unmerge(state)
        with torch.no_grad():
            assert_close(model(x), y, "output after unmerging")
    eject(model, state)
    with torch.no_grad():
        assert_close(model(reference.x.detach()), reference.base(reference.x.detach()), "output after ejecting")
