"""Lily: low-rank updates whose halves are shared by layers, mixed by a router (arXiv:2407.09946)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import ALL_LINEAR, BlockTargetFields, PeftConfig, PeftType, setting, settings
from inlay.core.affine import Site
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import KaimingUniform, Slot

__all__ = ["Lily", "LilyConfig"]


@settings(
    positional="r stride_A num_B scaling target_modules exclude_modules modules_to_save layers_to_transform "
    "layers_pattern init_weights"
)
class LilyConfig(BlockTargetFields, PeftConfig):
    """Configuration of Lily."""

    peft_type = PeftType.LILY

    r: int = setting(default=32, doc="Rank of the update.", gt=0, parameters="proportional")
    stride_A: int = setting(
        default=1,
        doc="Layers after each other that share one A; only layers chosen by one name, of one shape, do.",
        gt=0,
        parameters="r * in for each group of layers",
    )
    num_B: int = setting(
        default=2,
        doc="Matrices B that all layers chosen by one name share, and that the router mixes.",
        gt=1,
        parameters="num_B * r * out for each name, and num_B * r for each layer",
    )
    scaling: float = setting(default=1.0, doc="Scale of the update.")
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise B is random.")


@register_method
class Lily(Method):
    """``W x + s * (sum_i p_i B_i) A x`` with p the softmax of a router of A x, averaged over the batch.

    A sample's update depends on the other samples of its batch. Where adapters are chosen by sample, each sample is a
    batch of its own.
    """

    config_class = LilyConfig
    prefix = "lily_"
    numbers = ("r", "scaling", "stride_A", "num_B")
    mergeable = False
    couples = True
    additive = False  # the update depends on the input
    commutes = True
    config: LilyConfig

    def slots(self, site: Site) -> dict[str, Slot]:
        r, n = self.config.r, self.config.num_B
        drawn = KaimingUniform()
        leaf = {"leaf": "down", "discarded": drawn}  # PEFT makes ordinary layers first
        return {
            "A": site.slot("lily_A.*.weight", "r fan_in", drawn, options=leaf, r=r),
            "B": site.slot("lily_B.*.weight", "n out", self.still_or(drawn), options=leaf, n=n * r),
            "router": site.slot("lily_router.*.weight", "n r", drawn, options=leaf, n=n, r=r),
        }

    def borrows(self, sites: list[Site]) -> dict[str, dict[str, str]]:
        groups: dict[Any, list[str]] = {}
        for site in sites:
            groups.setdefault((self._chosen_by(site.name), site.form), []).append(site.name)
        found: dict[str, dict[str, str]] = {}
        for names in groups.values():
            for i, name in enumerate(names):
                lender = names[i - i % self.config.stride_A]
                found[name] = {role: other for role, other in (("A", lender), ("B", names[0])) if other != name}
        return found

    def _chosen_by(self, name: str) -> str:
        targets = self.config.target_modules or ()
        if targets == ALL_LINEAR:
            return name.rpartition(".")[2]
        if isinstance(targets, str):
            return targets
        return max((one for one in targets if name.endswith(one)), key=len, default=name)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        y, t = inner(x), inner.down(x, p.A)
        odds = torch.softmax(torch.nn.functional.linear(inner.ranks_last(t), p.router.to(t.dtype)), dim=-1)
        share = odds.flatten(0, -2).mean(0).to(p.B.dtype)
        B = torch.einsum("n,nro->or", share, p.B.view(self.config.num_B, self.config.r, site.out))
        return (y + inner.up(t, B) * p.scaling).to(y.dtype)
