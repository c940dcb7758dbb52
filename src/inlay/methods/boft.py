"""BOFT: rotate what a layer reads by a butterfly of small rotations (Liu et al. 2023, arXiv:2311.06243)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import MatrixTargetFields, PeftConfig, PeftType, bias_setting, check_one_given, setting, settings
from inlay.core.affine import Affine, Site
from inlay.core.dtype import merge_dtype
from inlay.core.method import Inner, P
from inlay.core.registry import register_method
from inlay.core.rotation import Butterfly, InputRotation, Rotation, cayley
from inlay.core.slot import Constant, Normal, Slot, zeros

__all__ = ["BOFT", "BOFTConfig"]


@settings(
    positional="boft_block_size boft_block_num boft_n_butterfly_factor target_modules exclude_modules boft_dropout "
    "fan_in_fan_out bias modules_to_save init_weights layers_to_transform layers_pattern"
)
class BOFTConfig(MatrixTargetFields, PeftConfig):
    """Configuration of BOFT. One of ``boft_block_size`` and ``boft_block_num`` is given, the other is 0."""

    peft_type = PeftType.BOFT

    boft_block_size: int = setting(
        default=4,
        doc="Input features in a block, or 0.",
        ge=0,
        parameters="in * block * factors + out a layer",
    )
    boft_block_num: int = setting(
        default=0, doc="Number of blocks, or 0.", ge=0, parameters="in * in / number * factors + out a layer"
    )
    boft_n_butterfly_factor: int = setting(
        default=1,
        doc="Factors of the rotation; with each, blocks of twice the size can be mixed.",
        gt=0,
        parameters="times the factors",
    )
    boft_dropout: float = setting(
        default=0.0, doc="Share of the blocks of one factor that a training forward leaves as they are.", ge=0.0, lt=1.0
    )
    bias: str = bias_setting("boft")
    init_weights: bool = setting(default=True, doc="Start from the identity; otherwise from small random rotations.")

    def check_fields(self) -> None:
        check_one_given(self, "boft_block_size", "boft_block_num")


@register_method
class BOFT(InputRotation):
    """``diag(s) W R^T`` with ``R = B_(m-1) ... B_0``; each block of B_i is ``(I - Q)(I + Q)^-1``, Q skew-symmetric.

    Q is the skew-symmetric part of a trained matrix. The bias is not scaled.
    """

    config_class = BOFTConfig
    prefix = "boft_"
    config: BOFTConfig

    def options(self, site: Site) -> dict[str, Any]:
        features, size, number = self.features(site), self.config.boft_block_size, self.config.boft_block_num
        size, number = (size, features // size) if size else (features // number, number)
        return {"boft_block_size": size, "boft_block_num": number}

    def refuse(self, site: Site) -> str | None:
        features, factors = self.features(site), self.config.boft_n_butterfly_factor
        field = "boft_block_size" if self.config.boft_block_size else "boft_block_num"
        if features == 1:
            return self.unrotatable(site, 1)
        if features % getattr(self.config, field):
            return f"{field}={getattr(self.config, field)} does not divide its {features} features"
        block = self.options(site)["boft_block_size"]
        reach = block * 2 ** (factors - 1)
        if features % reach or (factors > 1 and block % 2):
            return (
                f"{factors} butterfly factors join halves of blocks over {reach} features, which takes even blocks and "
                f"a multiple of that many features; found blocks of {block} and {features} features"
            )
        return self.unrotatable(site, block if block == 1 else reach)

    def smaller(self, site: Site) -> str:
        return f"let boft_block_size * 2^(boft_n_butterfly_factor - 1) divide {site.fan_in}"

    def slots(self, site: Site) -> dict[str, Slot]:
        found, start = self.options(site), self.config.init_weights
        sizes = {"m": self.config.boft_n_butterfly_factor, "n": found["boft_block_num"], "b": found["boft_block_size"]}
        return {
            "R": site.slot("boft_R.*", "*experts m n b b", zeros if start else Normal(0.1), **sizes),
            "s": site.slot(
                "boft_s.*",
                "1 out" if site.kernel else "*experts out 1",
                Constant(1.0) if start else Normal(0.1, mean=1.0),
            ),
        }

    def rotation(self, site: Site, p: P) -> Rotation:
        return Butterfly(self.turns(p))

    @staticmethod
    def turns(p: P) -> Tensor:
        """Return each block less the identity, (*experts, m, n, b, b)."""
        R = p.R.to(merge_dtype(p.R.dtype))
        return cayley(0.5 * (R - R.mT))

    def varied(self, site: Site, p: P) -> Rotation:
        turns = self.turns(p)
        m, n = turns.shape[:2]
        dropped = int(self.config.boft_dropout * n)
        if p.training and dropped:
            device = turns.device
            blocks = torch.rand(n, device=device).argsort() < dropped
            factor = torch.arange(m, device=device) == torch.randint(m, (), device=device)
            turns = turns.masked_fill((factor[:, None] & blocks)[..., None, None], 0.0)
        return Butterfly(turns)

    def rewrite(self, site: Site, p: P, layer: Affine, base: Affine) -> Affine:
        turned = super().rewrite(site, p, layer, base)
        return Affine(turned.weight * p.s.reshape(*site.experts, -1, 1), turned.bias)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        y, bias = super().forward(site, p, x, inner), inner.bias()
        plain = y if bias is None else y - site.along_output(bias)
        return (y + plain * (site.along_output(p.s.flatten()) - 1)).to(y.dtype)
