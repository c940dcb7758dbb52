"""Mix-ins for the fields that the methods of one family share; a class gives its own defaults, as in ``r = 32``."""

from __future__ import annotations

from typing import Any

from inlay.config.fields import (
    BlockTargetField,
    BlockTargetFields,
    FanInFanOutField,
    PatternFields,
    check_pattern_keys,
)
from inlay.config.settings import setting, settings
from inlay.errors import ConfigError

__all__ = [
    "CayleyFields",
    "FrequencyFields",
    "LycorisFields",
    "MatrixTargetField",
    "MatrixTargetFields",
    "ProjectionFields",
    "SavedProjectionFields",
    "check_one_given",
]


def check_one_given(config: Any, first: str, second: str) -> None:
    """Check that one of two numbers is given, and the other one 0.

    Raises:
        ConfigError: both are given, or none.
    """
    one, other = getattr(config, first), getattr(config, second)
    if (one == 0) == (other == 0):
        raise ConfigError(
            f"{type(config).__name__}: expected one of {first} and {second}, the other 0, found {first}={one} and "
            f"{second}={other}."
        )


@settings
class MatrixTargetField(BlockTargetField, FanInFanOutField):
    """Which modules of which blocks are adapted or saved whole, and how their weights are stored."""


@settings
class MatrixTargetFields(BlockTargetFields, FanInFanOutField):
    """Which modules of which blocks are adapted, left out, or saved whole, and how their weights are stored."""


@settings
class FrequencyFields(MatrixTargetFields):
    """A few trained numbers at random places of each layer's update."""

    n_frequency: int = setting(
        doc="Trained numbers of each layer's update.", default=1000, gt=0, parameters="that many a layer"
    )
    n_frequency_pattern: dict[str, int] | None = setting(
        doc="Counts that differ from n_frequency: module name, ending or regular expression -> count.",
        factory=dict,
        gt=0,
        parameters="those modules count with their own number",
    )
    scaling: float = setting(default=1.0, doc="Scale of the update.")

    def check_fields(self) -> None:
        check_pattern_keys(self, "n_frequency_pattern")


@settings
class SavedProjectionFields(MatrixTargetField):
    """Random tensors that never train, and whether they are in a checkpoint."""

    seed_field = "projection_seed"

    save_projection: bool = setting(
        default=True, doc="Keep the random projections in the checkpoint; otherwise they are drawn again from the seed."
    )

    def check_fields(self: Any) -> None:
        if not self.save_projection:
            self.warn(
                f"save_projection is False: the projections are drawn again from {self.seed_field} on loading, which "
                "other versions of torch may do differently."
            )


@settings
class ProjectionFields(SavedProjectionFields):
    """Random tensors that layers share, and the seed that they are drawn from."""

    seed_field = "projection_prng_key"

    projection_prng_key: int = setting(default=0, doc="Seed that the shared projections are drawn from.")


@settings
class LycorisFields(BlockTargetFields, PatternFields):
    """What LoHa and LoKr share, as in the LyCORIS project, where they come from."""

    alpha: int | float = setting(default=8, doc="Numerator of the scale alpha / r.")
    rank_dropout: float = setting(
        default=0.0, doc="Chance that a training forward leaves out a row of the update.", ge=0, lt=1
    )
    module_dropout: float = setting(
        default=0.0, doc="Chance that a training forward leaves out the update of a layer.", ge=0, lt=1
    )
    use_effective_conv2d: bool = setting(
        default=False,
        doc="Give kernels larger than 1 a tensor of their own (Tucker form) instead of flattening them.",
        parameters="a factor of a convolution has r * (r * kernel + its rows + its columns)",
    )


@settings
class CayleyFields(MatrixTargetFields):
    """How rotations are made of skew-symmetric matrices."""

    use_cayley_neumann: bool = setting(
        default=True,
        doc="A short series in place of the inverse: faster, and almost a rotation while the angles are small.",
    )
    num_cayley_neumann_terms: int = setting(default=5, doc="Terms of the series; one would be the identity.", gt=1)
