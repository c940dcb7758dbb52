"""AdaMSS: small updates of groups of output rows, inside the main directions of the weight (openreview 8ZdWmpYxT0)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.config import BlockTargetField, PeftConfig, PeftType, setting, settings
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.fills import Given
from inlay.core.lifecycle import Stepped
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot
from inlay.core.subspaces import allocate, main_directions, row_groups

__all__ = ["AdaMSS", "AdamssConfig"]


@settings(
    positional="r num_subspaces subspace_rank target_modules init_weights modules_to_save layers_to_transform "
    "layers_pattern use_asa asa_target_subspaces init_warmup final_warmup mask_interval asa_importance_beta "
    "asa_uncertainty_beta asa_schedule_exponent use_dynamic_rank svd_threshold random_seed"
)
class AdamssConfig(BlockTargetField, PeftConfig):
    """Configuration of AdaMSS."""

    peft_type = PeftType.ADAMSS

    r: int = setting(default=100, doc="Main directions of the weight; the smaller side of it at most.", gt=0)
    num_subspaces: int = setting(default=5, doc="Groups of output rows; one for each row at most.", gt=0)
    subspace_rank: int = setting(
        default=1,
        doc="Rank of each group's update; its number of rows at most.",
        gt=0,
        parameters="subspace_rank * (out + num_subspaces * r) a linear layer",
    )
    init_weights: str | bool | None = setting(
        default="orthogonal", doc="'orthogonal' starts from no change; None or False from random numbers."
    )
    use_asa: bool = setting(
        default=False, doc="Switch groups off in training that matter little (step has to be called)."
    )
    asa_target_subspaces: int = setting(default=50, doc="Groups of all layers that train in the end, with use_asa.")
    init_warmup: int = setting(default=50, doc="Step at which groups begin to be switched off.", ge=0)
    final_warmup: int = setting(default=1000, doc="Last step at which groups are switched off.", ge=0)
    mask_interval: int = setting(default=100, doc="Steps between two choices of groups.")
    asa_importance_beta: float = setting(default=0.85, doc="Decay of the moving mean of importance.", ge=0.0, le=1.0)
    asa_uncertainty_beta: float = setting(default=0.85, doc="Decay of the mean of its uncertainty.", ge=0.0, le=1.0)
    asa_schedule_exponent: float = setting(default=3.0, doc="How much faster groups are switched off at first.")
    use_dynamic_rank: bool = setting(
        default=False, doc="Take the rank of a group from its singular values, subspace_rank at most."
    )
    svd_threshold: float = setting(
        default=0.1, doc="Share of the largest singular value (squared) that counts, with use_dynamic_rank.", ge=0.0
    )
    random_seed: int = setting(default=0, doc="Seed of the approximate decomposition.")

    def check_fields(self) -> None:
        if self.init_weights is False:
            self.init_weights = None
        if self.init_weights not in ("orthogonal", None):
            raise self.wrong("init_weights", f"expected 'orthogonal' or None, found {self.init_weights!r}")
        for field in ("mask_interval", "asa_target_subspaces", "asa_schedule_exponent") if self.use_asa else ():
            if getattr(self, field) <= 0:
                raise self.wrong(field, f"expected more than 0 with use_asa, found {getattr(self, field)!r}")
        if self.use_asa and self.init_warmup >= self.final_warmup:
            wanted = f"expected less than final_warmup={self.final_warmup} with use_asa"
            raise self.wrong("init_warmup", f"{wanted}, found {self.init_warmup}")


@dataclass(frozen=True)
class Groups:
    """What a layer's weight says: rows in the order of their groups, and the sizes and ranks of these."""

    order: tuple[int, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]


def side_by_side(blocks: list[Tensor]) -> Tensor:
    """Return a block-diagonal matrix; ``torch.block_diag`` knows no tensors that are spread over processes."""
    widths = [block.shape[1] for block in blocks]
    rows = []
    for i, block in enumerate(blocks):
        before, after = (block.new_zeros(block.shape[0], sum(part)) for part in (widths[:i], widths[i + 1 :]))
        rows.append(torch.cat([before, block, after], 1))
    return torch.cat(rows)


@register_method
class AdaMSS(Method):
    """``[W b] + B_k A_k P`` on the rows of group k: P holds main directions of [W b], and B starts at zero.

    Rows are sorted into groups by k-means on the other side of the decomposition.
    """

    config_class = AdamssConfig
    prefix = "adamss_"
    config: AdamssConfig

    def __init__(self, config: AdamssConfig) -> None:
        super().__init__(config)
        self.groups: dict[str, Groups] = {}

    @property
    def identity(self) -> bool:
        return self.config.init_weights is not None

    def decompose(self, layer: Affine) -> tuple[Tensor, Tensor]:
        """Return (rows, r) and the main directions, (r, fan_in), with a column for the bias where there is one."""
        matrix = layer.weight.flatten(0, -2)
        if layer.bias is not None:
            matrix = torch.cat([matrix, layer.bias.reshape(-1, 1)], dim=1)
        return main_directions(matrix, self.config.r, self.config.random_seed)

    def look(self, site: Site, layer: Affine) -> None:
        config, U = self.config, self.decompose(layer)[0]
        found = row_groups(U, min(config.num_subspaces, len(U)))
        ranks = []
        for rows in found:
            rank = min(max(1, len(rows)), config.subspace_rank)
            if config.use_dynamic_rank and len(rows):
                values = torch.linalg.svdvals(U[rows]).square()
                rank = max(1, min(rank, int((values > config.svd_threshold * values[0]).sum())))
            ranks.append(rank)
        order = tuple(torch.cat(found).tolist())
        self.groups[site.patterns or site.name] = Groups(order, tuple(map(len, found)), tuple(ranks))

    def groups_at(self, site: Site) -> Groups:
        """Return a layer's groups; where its weight has no values, groups of one size, which add up to as much."""
        known = self.groups.get(site.patterns or site.name)
        if known is not None:
            return known
        rows = site.out * math.prod(site.experts)
        parts = torch.arange(rows).chunk(min(self.config.num_subspaces, rows))
        sizes = tuple(map(len, parts))
        return Groups(tuple(range(rows)), sizes, tuple(min(n, self.config.subspace_rank) for n in sizes))

    def options(self, site: Site) -> dict[str, Any]:
        return {"num_subspaces": len(self.groups_at(site).sizes)}

    def slots(self, site: Site) -> dict[str, Slot]:
        groups = self.groups_at(site)
        rows, columns = len(groups.order), site.fan_in + site.bias
        r = min(self.config.r, rows, columns)
        start = self.still_or(Normal(0.01))
        slots = {}
        for i, (size, rank) in enumerate(zip(groups.sizes, groups.ranks, strict=True)):
            slots[f"A{i}"] = site.slot(f"adamss_A.*.{i}", "k r", k=rank, r=r)
            slots[f"B{i}"] = site.slot(f"adamss_B.*.{i}", "n k", start, n=size, k=rank)
        slots["P"] = site.constant("adamss_newB.*", "r c", saved=True, r=r, c=columns)
        slots["rows"] = site.constant("adamss_rows.*", "n", Given(groups.order), dtype=torch.int64, n=rows)
        return slots

    def prepare(self, site: Site, p: P, layer: Affine) -> None:
        U, V = self.decompose(layer)
        p.P.copy_(V)
        groups = self.groups_at(site)
        for i, (rows, rank) in enumerate(zip(p.rows.cpu().split(groups.sizes), groups.ranks, strict=True)):
            if len(rows):
                main = torch.linalg.svd(U[rows.to(U.device)], full_matrices=False)[2][:rank]
                getattr(p, f"A{i}")[: len(main)].copy_(main)

    def delta(self, site: Site, p: P) -> LowRank:
        count = len(self.groups_at(site).sizes)
        B = side_by_side([getattr(p, f"B{i}") for i in range(count)])
        B = torch.zeros_like(B).index_copy(0, p.rows, B)
        A = torch.cat([getattr(p, f"A{i}") for i in range(count)]) @ p.P
        if site.bias:
            return LowRank(B, A[:, :-1], B @ A[:, -1])
        if site.experts:
            return LowRank(B.view(*site.experts, site.out, -1), A.expand(*site.experts, *A.shape))
        return LowRank(B, A)

    def step(self, adapter: Stepped, global_step: int) -> None:
        if self.config.use_asa:
            allocate(adapter, self.config, global_step)
