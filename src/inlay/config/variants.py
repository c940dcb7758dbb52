"""Options of LoRA's variants, each of which has a file in ``inlay.methods``."""

from __future__ import annotations

from typing import Any, Literal

from inlay.config.settings import Settings, setting, settings
from inlay.errors import ConfigError

__all__ = ["NO_VARIANT", "BdLoraConfig", "KasaConfig", "MontecloraConfig", "VeloraConfig", "check_variants"]

# The fields that ask for a variant other than DoRA, as a LoRA without one has them.
NO_VARIANT: dict[str, Any] = {
    "use_qalora": False,
    "use_bdlora": None,
    "kasa_config": None,
    "velora_config": None,
    "monteclora_config": None,
}


@settings
class VeloraConfig(Settings):
    """Options of VeLoRA."""

    num_groups: int = setting(
        default=64,
        doc="Sub-tokens that a token is cut into; backward keeps one number of each. More of them lose less.",
        gt=0,
    )
    scale: float = setting(default=1.0, doc="Factor on A's gradient.", gt=0)
    init_type: Literal["batch_average", "batch_average_once", "random"] = setting(
        default="batch_average",
        doc="The direction that sub-tokens are projected on: the mean of those of each batch, of those of the first "
        "batch, or a random one.",
    )


@settings
class BdLoraConfig(Settings):
    """Options of block-diagonal LoRA. A list's entries are searched for in the last part of a layer's path."""

    target_modules_bd_a: list[str] | None = setting(default=None, doc="Layers whose A is block-diagonal.")
    target_modules_bd_b: list[str] | None = setting(default=None, doc="Layers whose B is block-diagonal.")
    nblocks: int = setting(default=1, doc="Blocks of a factor; divides the rank and the layer's features.", gt=0)
    match_strict: bool = setting(default=True, doc="Refuse layers that are in neither list; otherwise plain LoRA.")

    def check_fields(self) -> None:
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        if both:
            raise ConfigError(
                f"{type(self).__name__}.target_modules_bd_a: expected nothing that target_modules_bd_b has too, found "
                f"{', '.join(map(repr, both))}"
            )


@settings
class KasaConfig(Settings):
    """Options of KaSA: weights of the terms that :func:`inlay.penalty` returns."""

    beta: float = setting(default=1e-4, doc="Weight of the squared singular values (equation 10).", ge=0)
    gamma: float = setting(default=1e-3, doc="Weight of the factors' distance from orthogonal (equation 11).", ge=0)


@settings
class MontecloraConfig(Settings):
    """Options of MonteCLoRA."""

    num_samples: int = setting(default=8, doc="Components of the mixture that A's noise is drawn from.", gt=0)
    use_entropy: bool = setting(default=False, doc="Add the sum of squared mixture weights to the loss.")
    dirichlet_prior: float = setting(default=0.1, doc="Concentration of the prior of the mixture weights.", gt=0)
    sample_scaler: float = setting(default=1e-4, doc="Factor on the noise.")
    kl_loss_weight: float = setting(default=1e-5, doc="Weight of the divergence from the priors in the loss.")
    buffer_size: int = setting(
        default=150, doc="Draws that PEFT makes in advance; Inlay draws when it needs to and holds none.", gt=0
    )


def check_variants(config: Any) -> None:
    """Hold the variants against how the factors start.

    Raises:
        ConfigError: the start's factors are no factors of the variant.
    """
    from inlay.inits.start import start_of

    owner, name = type(config).__name__, config.init_lora_weights
    start = start_of(name, owner)
    if config.use_qalora and start.reads_base:
        raise ConfigError(
            f"{owner}.use_qalora: expected False with init_lora_weights={name!r}, whose A is not constant on groups of "
            "inputs"
        )
    if config.use_bdlora is not None and (start.reads_base or start.name == "orthogonal"):
        raise ConfigError(
            f"{owner}.use_bdlora: expected None with init_lora_weights={name!r}, whose factors are not block-diagonal"
        )
