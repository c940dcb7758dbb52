"""LoRA: ``W + scaling * B @ A`` (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from inlay.config import (
    FanInFanOutField,
    LayerFields,
    PatternFields,
    PeftConfig,
    PeftType,
    TargetFields,
    bias_setting,
    setting,
    settings,
)
from inlay.core.affine import LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Init, KaimingUniform, Normal, Slot, Uniform, zeros
from inlay.errors import ConfigError

__all__ = ["LoRA", "LoraConfig", "LoraRuntimeConfig"]


@dataclass
class LoraRuntimeConfig:
    """Options of this process only; never saved."""

    ephemeral_gpu_offload: bool = False


@settings(
    positional="r target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora "
    "modules_to_save init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "megatron_config megatron_core trainable_token_indices loftq_config eva_config corda_config "
    "lora_ga_config use_dora velora_config alora_invocation_tokens use_qalora qalora_group_size "
    "monteclora_config layer_replication runtime_config lora_bias target_parameters use_bdlora "
    "arrow_config kasa_config ensure_weight_tying"
)
class LoraConfig(TargetFields, LayerFields, PatternFields, FanInFanOutField, PeftConfig):
    """Configuration of LoRA and its variants."""

    peft_type = PeftType.LORA

    r: int = setting(
        default=8, doc="Rank of the update.", gt=0, parameters="proportional: r * (in + out) a linear layer"
    )
    lora_alpha: int | float = setting(default=8, doc="Numerator of the scale alpha / r.")
    lora_dropout: float = setting(
        default=0.0, doc="Probability of dropping an input element of the update.", ge=0.0, lt=1.0
    )
    bias: str = bias_setting("lora")
    use_rslora: bool = setting(default=False, doc="Scale by alpha / sqrt(r), which keeps large ranks effective.")
    init_lora_weights: bool | str = setting(
        default=True,
        doc="How A and B start: true (A Kaiming-uniform, B zero), false (both random), 'gaussian' (A normal with "
        "deviation 1/r, B zero).",
    )
    megatron_config: dict[str, Any] | None = setting(default=None, doc="Arguments of Megatron's parallel layers.")
    megatron_core: str | None = setting(default="megatron.core", doc="Name of the Megatron module.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        default=None,
        doc="Token rows that train beside the update: indices of the input embedding, or layer name -> indices.",
        parameters="adds a row of the embedding for each token",
    )
    loftq_config: dict[str, Any] | None = setting(doc="Bits and iterations of the LoftQ start.", factory=dict)
    eva_config: dict[str, Any] | None = setting(default=None, doc="Options of the EVA start.")
    corda_config: dict[str, Any] | None = setting(default=None, doc="Options of the CorDA start.")
    lora_ga_config: dict[str, Any] | None = setting(default=None, doc="Options of the LoRA-GA start.")
    use_dora: bool = setting(
        default=False,
        doc="Train the magnitude of each output row apart from its direction (DoRA).",
        parameters="adds out",
    )
    velora_config: dict[str, Any] | None = setting(default=None, doc="Options of VeLoRA.")
    alora_invocation_tokens: list[int] | None = setting(
        default=None, doc="Tokens from which on the adapter is active (activated LoRA)."
    )
    use_qalora: bool = setting(default=False, doc="Read the input in groups (QA-LoRA).")
    qalora_group_size: int = setting(
        default=16, doc="Group size of QA-LoRA.", gt=0, parameters="divides A when use_qalora"
    )
    monteclora_config: dict[str, Any] | None = setting(default=None, doc="Options of MonteCLoRA.")
    layer_replication: list[tuple[int, int]] | None = setting(
        default=None,
        doc="Ranges [start, end) of blocks to stack into a deeper model that shares its base weights.",
        parameters="each repeated block has an adapter of its own",
    )
    runtime_config: LoraRuntimeConfig = setting(doc="Options of this process only.", factory=LoraRuntimeConfig)
    lora_bias: bool = setting(default=False, doc="Give B a bias.", parameters="adds out a layer")
    target_parameters: list[str] | None = setting(
        default=None,
        doc="Bare parameters to adapt, by dotted name or ending, such as the stacked weights of experts.",
        parameters="r * (in + out) a matrix, for every expert",
    )
    use_bdlora: dict[str, Any] | None = setting(default=None, doc="Options of block-diagonal LoRA.")
    arrow_config: dict[str, Any] | None = setting(default=None, doc="Options of Arrow routing.")
    kasa_config: dict[str, Any] | None = setting(default=None, doc="Options of KaSA.")
    ensure_weight_tying: bool = setting(
        default=False, doc="Adapt layers that share their weight together, with one set of tensors."
    )

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[nn.Module]]) -> None:
        """Let modules of some classes be adapted by layers of other classes than Inlay's; this is not saved.

        Args:
            mapping: class of a module -> class of the layer over it, which is constructed with the module, the
                adapter's name, ``config=`` and further keywords.
        """
        self.__dict__.setdefault("_custom_modules", {}).update(mapping)

    def check_fields(self) -> None:
        super().check_fields()
        owner = type(self).__name__
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ConfigError(
                f"{owner}.init_lora_weights: expected True, False or 'gaussian', found {self.init_lora_weights!r}; "
                "other starts are not available yet"
            )
        for field in _NOT_YET:
            if getattr(self, field):
                raise ConfigError(f"{owner}.{field}: not available yet, found {getattr(self, field)!r}")
        if self.lora_bias and self.use_dora:
            raise ConfigError(f"{owner}.lora_bias: expected False with use_dora=True, which has no place for it")


_NOT_YET = [
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "megatron_config",
]


@register_method
class LoRA(Method):
    """A low-rank update; B starts at zero, so a fresh adapter changes nothing."""

    config_class = LoraConfig
    prefix = "lora_"
    dropout_field = "lora_dropout"
    mixed = True
    unread = ("r", "lora_alpha")  # the tensors have the rank, and the scale says the rest
    shown = ("use_dora", "use_rslora", "lora_bias")
    patterned = ("rank_pattern", "alpha_pattern")
    config: LoraConfig

    @classmethod
    def variant(cls, config: Any) -> type[Method]:
        if config.use_dora:
            from inlay.methods.dora import DoRA

            return DoRA
        return cls

    @property
    def identity(self) -> bool:
        return self.config.init_lora_weights is not False

    def options(self, site: Site) -> dict[str, Any]:
        r = self.by_pattern("rank_pattern", site, self.config.r)
        alpha = self.by_pattern("alpha_pattern", site, self.config.lora_alpha)
        return {"r": r, "lora_alpha": alpha, "scaling": alpha / (math.sqrt(r) if self.config.use_rslora else r)}

    def refuse(self, site: Site) -> str | None:
        r = self.options(site)["r"]
        if r % site.groups:
            return f"a convolution of {site.groups} groups needs a rank that {site.groups} divides, found r={r}"
        if self.config.lora_bias and (site.lookup or site.parameter is not None):
            return "lora_bias needs a layer that can have a bias"
        return None

    def note(self, site: Site) -> str | None:
        if self.config.lora_bias and not site.bias:
            return (
                "lora_bias trains a bias that the layer itself does not have, so the adapter cannot be merged into it"
            )
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        r = self.options(site)["r"]
        start = self.config.init_lora_weights
        A: Init = Normal(1.0 / r) if start == "gaussian" else KaimingUniform()
        B: Init = KaimingUniform() if start is False else zeros
        drawn = start is not False  # PEFT makes ordinary layers first, which draw values of their own
        if site.lookup:
            first: dict[str, Any] = {"discarded": Normal(1.0)} if drawn else {}
            # One-hot inputs read columns of A, so A takes the zeros: B then gets gradients of a useful size at once.
            return {
                "A": site.slot("lora_embedding_A.*", "r in", zeros if drawn else Normal(1.0), options=first, r=r),
                "B": site.slot("lora_embedding_B.*", "out r", Normal(1.0), options=first, r=r),
            }
        n = math.prod(site.experts) * r
        # each group of outputs, and each expert, has a part of A's rank axis to itself
        first = {"discarded": KaimingUniform()} if drawn else {}
        down = {"leaf": "down", "blocks": site.groups * (n // r), **first}
        rank = n // site.groups
        slots = {
            "A": site.slot("lora_A.*.weight", "r all_in *kernel", A, options=down, r=n),
            "B": site.slot("lora_B.*.weight", "out r *ones", B, options={"leaf": "up", **first}, r=rank),
        }
        if self.config.lora_bias:
            first = {"discarded": Uniform(1 / math.sqrt(rank))} if drawn else {}
            slots["bias"] = site.slot("lora_B.*.bias", "out", options={"leaf": "up", **first})
        return slots

    def delta(self, site: Site, p: P) -> LowRank:
        A, B = self.factors(site, p.A, p.B)
        return LowRank(B, A, p.get("bias"), site.groups)

    @staticmethod
    def factors(site: Site, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return A as (*experts, r, fan_in) and B as (*experts, out, r).

        A bank keeps its experts packed in the rank axis: slowest in A, fastest in B.
        """
        if site.experts:
            n = math.prod(site.experts)
            B = B.view(B.shape[0], -1, n).permute(2, 0, 1)
            return A.view(n, -1, A.shape[1]).view(*site.experts, -1, A.shape[1]), B.reshape(*site.experts, *B.shape[1:])
        return site.matrix(A), site.matrix(B)
