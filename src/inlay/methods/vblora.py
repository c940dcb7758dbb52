"""VB-LoRA: factors whose pieces are mixed from a bank of vectors (Li et al. 2024, arXiv:2405.15179)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import MatrixTargetFields, PeftConfig, PeftType, bias_setting, dropout_setting, setting, settings
from inlay.core.affine import LowRank, Site
from inlay.core.divisors import undivided
from inlay.core.largest_logits import largest_alone, with_the_others
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot, Uniform
from inlay.errors import StateError

__all__ = ["VBLoRA", "VBLoRAConfig"]


@settings(
    positional="r num_vectors vector_length topk target_modules exclude_modules save_only_topk_weights vblora_dropout "
    "fan_in_fan_out bias modules_to_save init_vector_bank_bound init_logits_std layers_to_transform layers_pattern"
)
class VBLoRAConfig(MatrixTargetFields, PeftConfig):
    """Configuration of VB-LoRA."""

    peft_type = PeftType.VBLORA

    r: int = setting(
        default=4, doc="Rank.", gt=0, parameters="r * (in + out) / vector_length * num_vectors a layer, beside the bank"
    )
    num_vectors: int = setting(
        default=256, doc="Vectors in the bank.", gt=0, parameters="that many times vector_length, once"
    )
    vector_length: int = setting(
        default=256, doc="Length of the bank's vectors; divides the features of every adapted layer.", gt=0
    )
    topk: int = setting(default=2, doc="Vectors that each piece of a factor is mixed from.", gt=0)
    save_only_topk_weights: bool = setting(
        default=False,
        doc="Save which vectors are mixed and their weights, not the logits; training cannot go on then.",
    )
    vblora_dropout: float = dropout_setting()
    bias: str = bias_setting("vblora")
    init_vector_bank_bound: float = setting(default=0.02, doc="The bank starts uniformly in -this to this.", ge=0)
    init_logits_std: float = setting(default=0.1, doc="Deviation of the logits at the start.", ge=0)

    def check_fields(self) -> None:
        if self.topk > self.num_vectors:
            raise self.wrong("topk", f"expected at most num_vectors={self.num_vectors}, found {self.topk}.")


@register_method
class VBLoRA(Method):
    """``B A`` is added to W; each row of A and column of B is made of pieces of ``vector_length`` numbers.

    A piece is ``sum_k softmax(l_k) v_k`` over the ``topk`` vectors of the bank whose logits l are the largest.
    """

    config_class = VBLoRAConfig
    prefix = "vblora_"
    dropout_field = "vblora_dropout"
    identity = False
    numbers = ("r", "topk")
    patterned = ()
    config: VBLoRAConfig

    def refuse(self, site: Site) -> str | None:
        return undivided(site, "vector_length", self.config.vector_length)

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        shape, start = (self.config.num_vectors, self.config.vector_length), Uniform(self.config.init_vector_bank_bound)
        return {"bank": Slot("vblora_vector_bank.*", shape, ("n", "length"), start)} if sites else {}

    def slots(self, site: Site) -> dict[str, Slot]:
        config, start = self.config, Normal(self.config.init_logits_std)
        length = config.vector_length
        sizes: dict[str, Any] = {
            "r": config.r,
            "n": config.num_vectors,
            "down": site.fan_in // length,
            "up": site.out // length,
        }
        return {
            "logits_A": site.slot("vblora_logits_A.*", "*experts r down n", start, **sizes),
            "logits_B": site.slot("vblora_logits_B.*", "*experts up r n", start, **sizes),
        }

    def delta(self, site: Site, p: P) -> LowRank:
        if p.training and self.config.save_only_topk_weights and torch.is_grad_enabled():
            self.refuse_training(site, p.logits_A)
        A, B = self.pieces(p, p.logits_A), self.pieces(p, p.logits_B)
        return LowRank(B.mT.flatten(-3, -2), A.flatten(-2))

    @staticmethod
    def pieces(p: P, logits: Tensor) -> Tensor:
        """Return pieces (..., vector_length) for logits (..., num_vectors)."""
        largest, index = logits.topk(p.topk, dim=-1)
        return (largest.softmax(-1).unsqueeze(-1) * p.bank[index]).sum(-2)

    @staticmethod
    def refuse_training(site: Site, logits: Tensor) -> None:
        if not torch.compiler.is_compiling() and bool(logits.isinf().any()):
            raise StateError(
                f"{site.name!r}: its logits were loaded from a file with save_only_topk_weights, which lacks those of "
                "the vectors that are not mixed, so training cannot go on; save with save_only_topk_weights=False"
            )

    def pack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not config.save_only_topk_weights:
            return tensors
        return largest_alone(tensors, "vblora_logits_", config.topk, config.num_vectors)

    def unpack(self, config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return with_the_others(tensors, config.num_vectors)
