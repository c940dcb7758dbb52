"""The configuration of LoRA and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from inlay.config.base import PeftConfig
from inlay.config.fields import FanInFanOutField, LayerFields, PatternFields, TargetFields, bias_setting
from inlay.config.settings import setting, settings
from inlay.config.starts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, check_start
from inlay.config.types import PeftType
from inlay.config.variants import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig, check_variants
from inlay.errors import ConfigError

__all__ = ["LoraConfig", "LoraRuntimeConfig"]


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
    beyond = frozenset({"scope"})

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
        "deviation 1/r, B zero), 'orthogonal' (both random, B A = 0); from the weight: 'pissa' or "
        "'pissa_niter_[number]', 'olora', 'mica', 'loftq'; from data: 'corda', 'eva', 'lora_ga'.",
        parameters="'mica' freezes B",
    )
    megatron_config: dict[str, Any] | None = setting(default=None, doc="Arguments of Megatron's parallel layers.")
    megatron_core: str | None = setting(default="megatron.core", doc="Name of the Megatron module.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = setting(
        default=None,
        doc="Token rows that train beside the update: indices of the input embedding, or layer name -> indices.",
        parameters="adds a row of the embedding for each token",
    )
    loftq_config: dict[str, Any] | LoftQConfig | None = setting(
        doc="Bits and iterations of the LoftQ start.", factory=dict
    )
    eva_config: EvaConfig | None = setting(default=None, doc="Options of the EVA start.")
    corda_config: CordaConfig | None = setting(default=None, doc="Options of the CorDA start.")
    lora_ga_config: LoraGAConfig | None = setting(default=None, doc="Options of the LoRA-GA start.")
    use_dora: bool = setting(
        default=False,
        doc="Train the magnitude of each output row apart from its direction (DoRA).",
        parameters="adds out",
    )
    velora_config: VeloraConfig | None = setting(
        default=None, doc="Train A from inputs that are kept as a few numbers for each token (VeLoRA)."
    )
    alora_invocation_tokens: list[int] | None = setting(
        default=None, doc="Tokens from which on the adapter is active (activated LoRA)."
    )
    use_qalora: bool = setting(default=False, doc="Let A read the sums of groups of inputs (QA-LoRA).")
    qalora_group_size: int = setting(
        default=16,
        doc="Inputs in a group of QA-LoRA; divides the columns of the weight.",
        gt=0,
        parameters="divides A when use_qalora",
    )
    monteclora_config: MontecloraConfig | None = setting(
        default=None,
        doc="Draw A around its value while training (MonteCLoRA).",
        parameters="adds r + num_samples a layer",
    )
    layer_replication: list[tuple[int, int]] | None = setting(
        default=None,
        doc="Ranges [start, end) of blocks to stack into a deeper model that shares its base weights.",
        parameters="each repeated block has an adapter of its own",
    )
    runtime_config: LoraRuntimeConfig = setting(doc="Options of this process only.", factory=LoraRuntimeConfig)
    lora_bias: bool = setting(default=False, doc="Give B a bias.", parameters="adds out a layer")
    use_bdlora: BdLoraConfig | None = setting(
        default=None, doc="Make A or B of chosen layers block-diagonal (BD-LoRA).", parameters="divides A or B"
    )
    arrow_config: dict[str, Any] | None = setting(default=None, doc="Options of Arrow routing.")
    kasa_config: KasaConfig | None = setting(
        default=None,
        doc="Train in place of the weight's smallest singular directions, with singular values (KaSA).",
        parameters="adds r a layer",
    )
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
        check_start(self)
        check_variants(self)
        for field in _NOT_YET:
            if getattr(self, field):
                raise ConfigError(f"{owner}.{field}: not available yet, found {getattr(self, field)!r}")
        if self.lora_bias and self.use_dora:
            raise ConfigError(f"{owner}.lora_bias: expected False with use_dora=True, which has no place for it")


_NOT_YET = ["alora_invocation_tokens", "arrow_config", "megatron_config"]
