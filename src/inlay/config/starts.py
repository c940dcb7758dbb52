"""Options of the ways in which LoRA's factors can start; ``inlay.inits`` carries them out."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, Literal

from inlay.config.settings import Settings, setting, settings
from inlay.errors import ConfigError, InlayWarning

__all__ = ["CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig", "check_start"]


@settings
class LoftQConfig(Settings):
    """Options of the LoftQ start."""

    loftq_bits: int = setting(default=4, doc="Bits of the quantised base: 4 (NF4) or 8 (integers).", choices=(4, 8))
    loftq_iter: int = setting(default=1, doc="How often quantising and decomposing alternate.", ge=1)


@settings
class EvaConfig(Settings):
    """Options of the EVA start."""

    rho: float = setting(
        default=2.0, doc="The largest rank of a layer is rho * r; 1 gives every layer the same rank.", ge=1.0
    )
    tau: float = setting(
        default=0.99,
        doc="Cosine between a direction before and after a batch from which on it counts as found.",
        ge=0.0,
        le=1.0,
    )
    use_label_mask: bool = setting(default=True, doc="Leave out tokens whose label is label_mask_value.")
    label_mask_value: int = setting(default=-100, doc="The label of tokens that are left out.")
    whiten: bool = setting(default=False, doc="Divide directions by the square roots of their singular values.")
    adjust_scaling_factors: bool = setting(
        default=True, doc="Change lora_alpha with a layer's rank, so that the scale stays the same."
    )


@settings
class CordaConfig(Settings):
    """Options of the CorDA start."""

    cache_file: str | None = setting(default=None, doc="Where the directions are kept; read if it is there.")
    covariance_file: str | None = setting(default=None, doc="Where the covariances are kept; read if it is there.")
    corda_method: Literal["ipm", "kpm"] = setting(
        default="ipm",
        doc="'ipm' trains the directions that the sample uses most, 'kpm' those that it uses least, to keep what the "
        "model knows.",
    )
    verbose: bool = setting(default=False, doc="Show progress.")
    use_float16_for_covariance: bool = setting(
        default=False, doc="Hold covariances in the inputs' own dtype, not in float32."
    )
    prune_temporary_fields: bool = setting(
        default=True, doc="Take covariances off the layers once the directions are known."
    )


@settings
class LoraGAConfig(Settings):
    """Options of the LoRA-GA start."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = setting(
        default="ArB2r",
        doc="Which of the gradient's 2r leading singular directions A and B take: in turns, B the first and A the "
        "second half, A the first and B the second half, or both the same r at random.",
    )
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = setting(
        default="stable",
        doc="How large the factors are: by out^(1/4) / sqrt(stable_gamma), by the weight's largest singular value, "
        "divided by the scale, or as they are.",
    )
    stable_gamma: int = setting(default=16, doc="Divisor of scale='stable'.", gt=0)


_OPTIONS = {"eva": ("eva_config", EvaConfig), "corda": ("corda_config", CordaConfig)}


def check_start(config: Any) -> None:
    """Hold the fields about the start against each other; options of other starts warn.

    Raises:
        ConfigError: there is no such start, or it lacks what it needs.
    """
    from inlay.inits.start import start_of

    owner = type(config).__name__
    start = start_of(config.init_lora_weights, owner)
    if dataclasses.is_dataclass(config.loftq_config):
        config.loftq_config = dataclasses.asdict(config.loftq_config)  # type: ignore[arg-type]  # an instance
    if start.name == "loftq":
        if not config.loftq_config:
            raise ConfigError(
                f"{owner}.loftq_config: expected a LoftQConfig with init_lora_weights='loftq', found "
                f"{config.loftq_config!r}"
            )
        LoftQConfig(**config.loftq_config)
    elif config.loftq_config:
        _warn(f"{owner}.loftq_config is ignored, because init_lora_weights is not 'loftq'")
        config.loftq_config = {}
    for name, (field, made) in _OPTIONS.items():
        given = getattr(config, field)
        if start.name == name and given is None:
            _warn(f"{owner}.{field} is not set, so init_lora_weights={name!r} has its defaults")
            setattr(config, field, made())
        elif start.name != name and given is not None:
            _warn(f"{owner}.{field} is ignored, because init_lora_weights is not {name!r}")


def _warn(text: str) -> None:
    warnings.warn(text, InlayWarning, stacklevel=6)
