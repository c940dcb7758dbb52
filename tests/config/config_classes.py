"""A configuration class made from the shared parts, with the fields of PEFT's LoHaConfig."""

from __future__ import annotations

from inlay.config import (
    ExcludeField,
    LayerFields,
    PatternFields,
    PeftConfig,
    PeftType,
    SavedModulesField,
    TargetField,
    setting,
    settings,
)


@settings(
    positional="rank_pattern alpha_pattern r alpha rank_dropout module_dropout use_effective_conv2d target_modules "
    "exclude_modules init_weights layers_to_transform layers_pattern modules_to_save"
)
class HadamardConfig(TargetField, ExcludeField, SavedModulesField, LayerFields, PatternFields, PeftConfig):
    peft_type = PeftType.LOHA

    r: int = setting(8, doc="Rank.", gt=0)
    alpha: int | float = setting(8, doc="Numerator of the scale.")
    rank_dropout: float = setting(0.0, doc="Share of ranks dropped.", ge=0, lt=1)
    module_dropout: float = setting(0.0, doc="Share of modules dropped.", ge=0, lt=1)
    use_effective_conv2d: bool = setting(False, doc="Decompose kernels.")
    init_weights: bool = setting(True, doc="Start from no change.")


@settings
class TokensConfig(TargetField, PeftConfig):
    peft_type = PeftType.TRAINABLE_TOKENS

    token_indices: list[int] = setting(doc="Rows to train.", factory=list, ge=0)
