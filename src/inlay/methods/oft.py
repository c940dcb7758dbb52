"""OFT: rotate what a layer reads, block by block (Qiu et al. 2023, arXiv:2306.07280; OFTv2: 2025, arXiv:2506.19847)."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from inlay.config import CayleyFields, PeftConfig, PeftType, bias_setting, check_one_given, setting, settings
from inlay.core.affine import Site
from inlay.core.divisors import nearest_divisor
from inlay.core.method import P
from inlay.core.registry import register_method
from inlay.core.rotation import Butterfly, InputRotation, Rotation, Triangle, cayley, cayley_series, skew
from inlay.core.slot import Normal, Slot
from inlay.errors import CheckpointError

__all__ = ["OFT", "OFTConfig"]


@settings(
    positional="r oft_block_size module_dropout target_modules fan_in_fan_out bias exclude_modules init_weights "
    "layers_to_transform layers_pattern modules_to_save coft eps block_share use_cayley_neumann "
    "num_cayley_neumann_terms"
)
class OFTConfig(CayleyFields, PeftConfig):
    """Configuration of OFT. One of ``r`` and ``oft_block_size`` is given: their product is the number of inputs."""

    peft_type = PeftType.OFT

    r: int = setting(default=0, doc="Number of blocks, or 0.", ge=0, parameters="in * (in / r - 1) / 2 a layer")
    oft_block_size: int = setting(
        default=32, doc="Input features in a block, or 0.", ge=0, parameters="in * (block - 1) / 2 a layer"
    )
    module_dropout: float = setting(
        default=0.0, doc="Chance that a training forward leaves a block of features as it is.", ge=0.0, lt=1.0
    )
    bias: str = bias_setting("oft")
    init_weights: bool = setting(default=True, doc="Start from the identity; otherwise from small random rotations.")
    coft: bool = setting(default=False, doc="Keep the rotations near the identity (constrained OFT).")
    eps: float = setting(default=6e-5, doc="How far from it, with coft.", gt=0)
    block_share: bool = setting(
        default=False, doc="One rotation for all blocks of a layer.", parameters="divided by the number of blocks"
    )

    def check_fields(self) -> None:
        check_one_given(self, "r", "oft_block_size")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        if "oft_block_size" not in kwargs:
            raise CheckpointError(
                "this OFT adapter has no oft_block_size: it was trained with PEFT before 0.14, whose rotations were "
                "stored in another form that cannot be read"
            )
        return super().check_kwargs(**kwargs)

    @property
    def full_last_term(self) -> bool:
        """Whether the series ends as PEFT before 0.18 ended it: the last power counts twice, as those before it."""
        version = re.match(r"(\d+)\.(\d+)", self.peft_version or "")
        if not self.use_cayley_neumann or self.num_cayley_neumann_terms == 2 or version is None:
            return False
        return tuple(map(int, version.groups())) < (0, 18)

    @property
    def written_version(self) -> str:
        # a later release would read another series
        return (self.peft_version or "") if self.full_last_term else super().written_version


@register_method
class OFT(InputRotation):
    """``W R^T`` with R block-diagonal and orthogonal, so that ``x`` is read as ``x R``; an embedding's rows are turned.

    R comes from skew-symmetric Q: ``(I - Q)(I + Q)^-1`` (Cayley), or ``I + 2Q + 2Q^2 + ... + Q^k`` (Cayley-Neumann).
    """

    config_class = OFTConfig
    prefix = "oft_"
    mixed = True
    skip_probability = 0.0  # module_dropout leaves out blocks here
    config: OFTConfig

    def options(self, site: Site) -> dict[str, Any]:
        features, config = self.features(site), self.config
        series = {"full_last_term": True} if config.full_last_term else {}
        if config.oft_block_size:
            block = nearest_divisor(features, config.oft_block_size)
            return {"r": features // block, "oft_block_size": block, **series}
        r = nearest_divisor(features, config.r)
        return {"r": r, "oft_block_size": features // r, **series}

    def note(self, site: Site) -> str | None:
        found = self.options(site)
        for name in ("r", "oft_block_size"):
            wish = getattr(self.config, name)
            if wish and wish != found[name]:
                return f"{name}={wish} does not divide its {self.features(site)} features; {found[name]} is taken"
        return None

    def refuse(self, site: Site) -> str | None:
        return self.unrotatable(site, self.options(site)["oft_block_size"])

    def smaller(self, site: Site) -> str:
        return f"take an oft_block_size that divides {site.fan_in}"

    def slots(self, site: Site) -> dict[str, Slot]:
        found = self.options(site)
        name = "oft_embedding_R" if site.lookup else "oft_R"
        init = self.still_or(Normal(0.1))
        blocks = 1 if self.config.block_share else found["r"]
        return Triangle.slots(site, f"{name}.*", "*experts blocks n", init, b=found["oft_block_size"], blocks=blocks)

    def skew(self, p: P) -> Tensor:
        """Return Q, (*experts, blocks, b, b)."""
        Q = skew(p, p.oft_block_size)
        if self.config.coft:
            limit = self.config.eps / math.sqrt(Q.shape[-3])
            with torch.no_grad():
                norm = torch.linalg.matrix_norm(Q, keepdim=True)
                shift = torch.where(norm > limit, Q * (limit / norm), Q) - Q
            Q = Q + shift  # the gradient is that at the projected point, as in projected descent
        return Q

    def turn(self, p: P) -> Tensor:
        """Return R - I, (*experts, blocks, b, b)."""
        Q = self.skew(p)
        if not self.config.use_cayley_neumann:
            return cayley(Q)
        terms = self.config.num_cayley_neumann_terms
        if getattr(p, "full_last_term", False):
            total, power = 2 * Q, Q
            for _ in range(2, terms):
                power = power @ Q
                total = total + 2 * power
            return total
        return cayley_series(Q, terms)

    def rotation(self, site: Site, p: P) -> Rotation:
        return Butterfly(self.turn(p).expand(*site.experts, p.r, -1, -1).unsqueeze(-4))

    def varied(self, site: Site, p: P) -> Rotation:
        turn = self.turn(p).expand(*site.experts, p.r, -1, -1).unsqueeze(-4)
        if p.training and self.config.module_dropout > 0.0 and not self.config.block_share:
            turn = turn * (torch.rand_like(turn[..., :1, :1]) >= self.config.module_dropout)
        return Butterfly(turn)
