"""What each method is configured like in ``benchmarks.learning``: on one small layer, and on a sentence encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import inlay

__all__ = ["LAYERS", "METHODS", "Learner"]

# the small layers that a teacher and its student have; every width below divides these sizes
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 48),
    "norm": lambda: nn.LayerNorm(64),
    "embedding": lambda: nn.Embedding(64, 48),
}
LINEAR = ["query", "key", "value", "dense"]  # every linear layer of the encoder


@dataclass(frozen=True)
class Learner:
    """One method under test.

    Attributes:
        config: its config class.
        fields: of the config, on both tasks.
        rate: Adam's step on the small layer.
        layer: which of :data:`LAYERS` is adapted.
        steps: on the small layer, where the usual number is not enough.
        targets: modules of the encoder.
        encoder: fields of the config there that differ.
        encoder_rate: Adam's step there, set by short runs that validation texts judged.
        encoder_steps: there, where the usual number is not enough.
        call: what a forward pass is told besides its input, for a batch of some samples.
    """

    config: str
    fields: dict[str, Any] = field(default_factory=dict)
    rate: float = 1e-2
    layer: str = "linear"
    steps: int = 300
    targets: list[str] = field(default_factory=lambda: LINEAR)
    encoder: dict[str, Any] = field(default_factory=dict)
    encoder_rate: float = 5e-3
    encoder_steps: int = 60
    call: Callable[[int], dict[str, Any]] = lambda samples: {}

    def settings(self, targets: list[str], **more: Any) -> Any:
        """Return the config for some targets."""
        return getattr(inlay, self.config)(**{**self.fields, "target_modules": targets, **more})


def tasks(samples: int) -> dict[str, Any]:
    return {"task_ids": torch.zeros(samples, dtype=torch.long)}


METHODS: dict[str, Learner] = {
    "ADALORA": Learner(
        "AdaLoraConfig", {"init_r": 8, "target_r": 4, "lora_alpha": 8, "total_step": 1000}, encoder_rate=0.02
    ),
    "ADAMSS": Learner("AdamssConfig", {"r": 16, "num_subspaces": 4, "subspace_rank": 2}, encoder_rate=1e-2),
    "BEFT": Learner("BeftConfig", rate=3e-2, encoder_rate=2e-2),
    "BOFT": Learner("BOFTConfig", {"boft_block_size": 8}, encoder_rate=0.01),
    "C3A": Learner(
        "C3AConfig", {"block_size": 16, "init_weights": True}, rate=0.2, encoder={"block_size": 64}, encoder_rate=0.9
    ),
    "DEFT": Learner("DeftConfig", {"r": 8, "alpha": 8}),
    "DELORA": Learner(
        "DeloraConfig", {"r": 8, "delora_lambda": 8}, rate=0.003, steps=1000, encoder_rate=3e-3, encoder_steps=150
    ),
    "FOURIERFT": Learner(
        "FourierFTConfig",
        {"n_frequency": 256, "scaling": 100.0, "init_weights": True},
        rate=5e-2,
        encoder={"n_frequency": 1000},
        encoder_rate=0.3,
    ),
    "FROD": Learner("FrodConfig", {"sparse_rate": 0.05}),
    "GLORA": Learner("GloraConfig", {"r": 8}),
    "GRALORA": Learner("GraloraConfig", {"r": 8, "alpha": 8}, encoder_rate=0.005),
    "HIRA": Learner("HiraConfig", {"r": 8}, rate=3e-2, encoder_rate=6e-2),
    "HRA": Learner("HRAConfig", {"r": 8}, rate=3e-2, encoder_rate=3e-2),
    "IA3": Learner("IA3Config", {"feedforward_modules": []}, rate=3e-2, encoder_rate=0.15),
    "LILY": Learner("LilyConfig", {"r": 8, "num_B": 2, "scaling": 1.0}),
    "LN_TUNING": Learner("LNTuningConfig", layer="norm", targets=["LayerNorm"], encoder_rate=0.03),
    "LOHA": Learner("LoHaConfig", {"r": 4, "alpha": 4}, rate=0.01, steps=1000, encoder_rate=3e-2),
    "LOKR": Learner("LoKrConfig", {"r": 8, "alpha": 8}, encoder_rate=3e-2),
    "LORA": Learner("LoraConfig", {"r": 8, "lora_alpha": 8}, encoder_rate=0.003),
    "LORA, DoRA": Learner("LoraConfig", {"r": 8, "lora_alpha": 8, "use_dora": True}, encoder_rate=0.003),
    "MISS": Learner("MissConfig", {"r": 8}, encoder_rate=2e-3, encoder_steps=150),
    "OFT": Learner("OFTConfig", {"oft_block_size": 16}, encoder_rate=0.01),
    "OSF": Learner("OSFConfig", rate=0.1, steps=1000, encoder_rate=1e-3),
    "PEANUT": Learner("PeanutConfig", {"r": 8, "act_fn": "silu", "scaling": 1.0}),
    "POLY": Learner("PolyConfig", {"r": 8, "n_skills": 2, "n_tasks": 1}, call=tasks, encoder_rate=3e-2),
    "PSOFT": Learner(
        "PsoftConfig", {"r": 16, "psoft_alpha": 16}, encoder={"r": 64, "psoft_alpha": 64}, encoder_rate=1e-2
    ),
    "PVERA": Learner("PveraConfig", {"r": 64}, rate=3e-2, encoder={"r": 256}, encoder_rate=0.1),
    "RANDLORA": Learner("RandLoraConfig", {"r": 8, "randlora_alpha": 80}, encoder_rate=0.001),
    "ROAD": Learner("RoadConfig", {"group_size": 16}, encoder_rate=0.1),
    "SHIRA": Learner("ShiraConfig", {"r": 8, "random_seed": 1}, rate=1e-2, encoder_rate=9e-3),
    "SUPERTUNING": Learner("SupertuningConfig", {"sparsity": 0.8}, encoder_rate=2e-3),
    "TINYLORA": Learner(
        "TinyLoraConfig",
        {"r": 4, "u": 16},
        rate=5e-2,
        encoder={"r": 32, "u": 512, "weight_tying": 0.0},
        encoder_rate=2e-3,
        encoder_steps=120,
    ),
    "TRAINABLE_TOKENS": Learner(
        "TrainableTokensConfig",
        {"token_indices": list(range(0, 64, 4))},
        rate=5e-2,
        layer="embedding",
        targets=["word_embeddings"],
        encoder_rate=3e-3,
        encoder_steps=100,
    ),
    "UNILORA": Learner(
        "UniLoraConfig", {"r": 4, "theta_d_length": 200}, rate=2e-2, encoder={"theta_d_length": 4000}, encoder_rate=3e-2
    ),
    "VBLORA": Learner(
        "VBLoRAConfig",
        {"r": 4, "num_vectors": 16, "vector_length": 16, "topk": 2},
        encoder={"num_vectors": 64},
        rate=0.01,
        steps=1000,
        encoder_rate=3e-2,
        encoder_steps=150,
    ),
    "VERA": Learner("VeraConfig", {"r": 64}, rate=3e-2, encoder={"r": 256}, encoder_rate=0.2),
    "WAVEFT": Learner(
        "WaveFTConfig",
        {"n_frequency": 256, "scaling": 25.0},
        rate=1e-2,
        encoder={"n_frequency": 1000},
        encoder_rate=4e-3,
    ),
}
