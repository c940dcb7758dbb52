"""OSF: the small singular directions of a weight are trained, away from the large ones (arXiv:2504.07097)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from inlay.config import (
    ALL_LINEAR,
    PeftConfig,
    PeftType,
    SavedModulesField,
    TargetField,
    check_pattern,
    default_targets,
    setting,
    settings,
)
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot

__all__ = ["OSF", "OSFConfig"]


def _rank_rule(value: Any) -> str | None:
    values = value.values() if isinstance(value, dict) else [value]
    wrong = any(isinstance(one, float) and one > 1 and not one.is_integer() for one in values)
    return "a whole number, or a share of at most 1" if wrong else None


@settings(positional="effective_rank target_modules rank_pattern init_weights modules_to_save target_svd_config")
class OSFConfig(TargetField, SavedModulesField, PeftConfig):
    """Configuration of orthogonal subspace fine-tuning."""

    peft_type = PeftType.OSF

    effective_rank: int | float | None = setting(
        default=None,
        doc="Singular directions that stand still: a number, or a float of at most 1 for a share of the smaller side; "
        "half of it by default.",
        gt=0,
        check=_rank_rule,
        parameters="the others train: (min(in, out) - effective_rank) * (in + out + 1) a linear layer",
    )
    rank_pattern: dict[str, int | float] | None = setting(
        default=None,
        doc="Numbers that differ from effective_rank: regular expression found in a module's name -> number.",
        gt=0,
        check=_rank_rule,
        parameters="those modules count with their own number",
    )
    init_weights: bool | None = setting(default=True, doc="Start from no change; False starts from random directions.")
    target_svd_config: dict[str, int] | None = setting(default=None, doc="Kept for files that have it; not read.")

    def check_fields(self) -> None:
        self.init_weights = self.init_weights is not False  # files of earlier releases say null
        for pattern in self.rank_pattern or ():
            check_pattern(type(self).__name__, "rank_pattern", pattern)


@register_method
class OSF(Method):
    """``U S V`` of the small singular values of W is replaced by a trained one that starts as it.

    Gradients of U and V are projected onto what is orthogonal to the large singular directions.
    """

    config_class = OSFConfig
    prefix = "osf_"
    detaches = True  # what a projection takes from a gradient
    config: OSFConfig

    def implied(self, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        known = model_type is not None and default_targets("OSF", model_type) is not None
        if self.config.target_modules is None and not known:
            return {"target_modules": ALL_LINEAR}
        return super().implied(model, model_type)

    def means(self, field: str, key: str, site: Site) -> bool:
        return re.search(key, site.patterns or site.name) is not None

    def options(self, site: Site) -> dict[str, Any]:
        least = min(site.out, site.fan_in)
        value = self.config.effective_rank
        name = site.patterns or site.name
        for pattern, other in (self.config.rank_pattern or {}).items():
            if re.search(pattern, name):
                value = other
                break
        if value is None:
            rank = least // 2
        elif isinstance(value, float) and value <= 1:
            rank = int(least * value)
        else:
            rank = int(value)
        return {"effective_rank": rank}

    def refuse(self, site: Site) -> str | None:
        rank, least = self.options(site)["effective_rank"], min(site.out, site.fan_in)
        if rank < 1:
            return f"a matrix of {site.out} x {site.fan_in} has no singular direction to keep beside those that train"
        if rank >= least:
            return f"effective_rank={rank} leaves none of its {least} singular directions to train"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        keep = self.options(site)["effective_rank"]
        start = self.still_or(Normal(1.0))
        sizes = {"k": min(site.out, site.fan_in) - keep, "h": keep}
        slots = {
            "U": site.slot("osf_svd_params.*.U_low", "*experts out k", start, **sizes),
            "S": site.slot("osf_svd_params.*.S_low", "*experts k", start, **sizes),
            "V": site.slot("osf_svd_params.*.V_low", "*experts k fan_in", start, **sizes),
            "U0": site.constant("_osf_U_low_init.*", "*experts out k", **sizes),
            "S0": site.constant("_osf_S_low_init.*", "*experts k", **sizes),
            "V0": site.constant("_osf_V_low_init.*", "*experts k fan_in", **sizes),
        }
        # Where one side is square, what is orthogonal to its large directions is spanned by its small ones.
        if site.out > site.fan_in:
            slots["U1"] = site.constant("_osf_U_high.*", "*experts out h", **sizes)
        if site.out < site.fan_in:
            slots["V1"] = site.constant("_osf_V_high.*", "*experts h fan_in", **sizes)
        return slots

    def derive(self, site: Site, p: P, layer: Affine) -> None:
        keep = self.options(site)["effective_rank"]
        U, S, V = torch.linalg.svd(layer.weight, full_matrices=False)
        p.U0.copy_(U[..., keep:])
        p.S0.copy_(S[..., keep:])
        p.V0.copy_(V[..., keep:, :])
        if site.out > site.fan_in:
            p.U1.copy_(U[..., :keep])
        if site.out < site.fan_in:
            p.V1.copy_(V[..., :keep, :])

    def prepare(self, site: Site, p: P, layer: Affine) -> None:
        if self.identity:
            for here, start in ((p.U, p.U0), (p.S, p.S0), (p.V, p.V0)):
                here.copy_(start)

    def delta(self, site: Site, p: P) -> LowRank:
        U, V = p.U, p.V
        if torch.is_grad_enabled():
            U1, V1 = p.get("U1"), p.get("V1")
            U = _through(U, p.U0 @ (p.U0.mT @ U) if U1 is None else U - U1 @ (U1.mT @ U))
            V = _through(V, (V @ p.V0.mT) @ p.V0 if V1 is None else V - (V @ V1.mT) @ V1)
        B = torch.cat([U * p.S.unsqueeze(-2), -p.U0 * p.S0.unsqueeze(-2)], dim=-1)
        return LowRank(B, torch.cat([V, p.V0], dim=-2))


def _through(tensor: Tensor, projected: Tensor) -> Tensor:
    """Return the tensor, with the gradient that goes through its projection."""
    return tensor.detach() + (projected - projected.detach())
