"""PSOFT: rotate a layer within its principal subspace (Wu et al. 2025, arXiv:2505.11235)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from inlay.config import CayleyFields, PeftConfig, PeftType, dropout_setting, setting, settings
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.fills import Identity
from inlay.core.method import Method, P
from inlay.core.registry import register_method
from inlay.core.rotation import Triangle, cayley, cayley_series, skew
from inlay.core.slot import Constant, Normal, Slot

__all__ = ["PSOFT", "PsoftConfig"]


@settings(
    positional="r target_modules exclude_modules psoft_alpha psoft_dropout fan_in_fan_out ab_svd_init psoft_svd "
    "psoft_svd_lowrank_niter random_seed psoft_orth psoft_mag_b psoft_mag_a use_cayley_neumann "
    "num_cayley_neumann_terms cayley_neumann_eps modules_to_save init_weights layers_to_transform layers_pattern"
)
class PsoftConfig(CayleyFields, PeftConfig):
    """Configuration of PSOFT."""

    peft_type = PeftType.PSOFT

    r: int = setting(default=32, doc="Dimensions of the subspace.", gt=0, parameters="r * (r - 1) / 2 + 2 * r a layer")
    psoft_alpha: int = setting(
        default=32, doc="Numerator of the scale alpha / r, which the subspace's factors are divided by.", gt=0
    )
    psoft_dropout: float = dropout_setting()
    ab_svd_init: Literal["psoft_init", "pissa_init"] = setting(
        default="psoft_init", doc="Where the singular values go: all to B, or their roots to A and to B ('pissa_init')."
    )
    psoft_svd: Literal["full", "lowrank"] = setting(
        default="full", doc="How the weight is decomposed: exactly, or by a few random projections."
    )
    psoft_svd_lowrank_niter: int = setting(default=10, doc="Power iterations of those.", ge=0)
    random_seed: int = setting(default=0, doc="Seed of those.")
    psoft_orth: bool = setting(
        default=True, doc="Train a rotation; otherwise any matrix.", parameters="r * r without it"
    )
    psoft_mag_b: bool = setting(default=True, doc="Train a scale of each row of the rotation.", parameters="r")
    psoft_mag_a: bool = setting(default=True, doc="Train a scale of each column of the rotation.", parameters="r")
    use_cayley_neumann = False
    cayley_neumann_eps: float | None = setting(
        default=None, doc="Bound on the norm of what the series is taken of.", gt=0, lt=1
    )
    init_weights: bool = setting(default=True, doc="Start from the identity; otherwise from a small random rotation.")

    def check_fields(self) -> None:
        unread = {"psoft_svd_lowrank_niter": self.psoft_svd == "lowrank"} | dict.fromkeys(
            ["num_cayley_neumann_terms", "cayley_neumann_eps"], self.use_cayley_neumann
        )
        for field, read in unread.items():
            if not read and getattr(self, field) != type(self).__dataclass_fields__[field].default:
                asks = "psoft_svd" if "svd" in field else "use_cayley_neumann"
                self.warn(f"{field} is not read, because {asks} does not ask for it")


def _identity(like: Tensor) -> Tensor:
    return torch.diag_embed(torch.ones_like(like[..., 0]))


@register_method
class PSOFT(Method):
    """``B (diag(b) R diag(a) - I) A`` is added to W, B A being the best approximation of W of rank r.

    R is ``(I + Q)(I - Q)^-1`` with a skew-symmetric Q, or its series. A and B are made anew from the untouched W
    wherever the adapter is loaded, and no checkpoint holds them; the scale alpha / r cancels.
    """

    config_class = PsoftConfig
    prefix = "psoft_"
    numbers = ("r", "psoft_alpha")
    dropout_field = "psoft_dropout"
    config: PsoftConfig

    def options(self, site: Site) -> dict[str, Any]:
        return {**super().options(site), "scaling": self.config.psoft_alpha / self.config.r}

    def refuse(self, site: Site) -> str | None:
        least = min(site.out, site.fan_in)
        if self.config.r > least:
            return f"a weight of {site.out} x {site.fan_in} has a rank of {least} at most, found r={self.config.r}"
        if self.config.r == 1 and not (self.config.psoft_mag_a or self.config.psoft_mag_b) and self.config.psoft_orth:
            return "a rotation of one dimension has nothing to train"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        config = self.config
        if config.psoft_orth:
            start = self.still_or(Normal(0.1))
            slots = Triangle.slots(site, "psoft_R.*", "*experts n", start, b=config.r)
        else:
            start = Identity(0.0 if config.init_weights else 0.1)
            slots = {"free": site.slot("psoft_R.*.weight", "*experts w w", start, w=config.r)}
        for name, wanted in (("b", config.psoft_mag_b), ("a", config.psoft_mag_a)):
            if wanted:
                slots[name] = site.slot(f"psoft_R.*.vector_{name}", "*experts w", Constant(1.0), w=config.r)
        # zeros stand in until derive
        slots["A"] = site.constant("_psoft_A_cache.*", "*experts r fan_in", r=config.r)
        slots["B"] = site.constant("_psoft_B_cache.*", "*experts out r", r=config.r)
        return slots

    def derive(self, site: Site, p: P, layer: Affine) -> None:
        W, config = layer.weight, self.config
        if config.psoft_svd == "full":
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        else:
            with torch.random.fork_rng([] if W.device.type == "cpu" else [W.device], device_type=W.device.type):
                torch.manual_seed(config.random_seed)
                U, S, V = torch.svd_lowrank(W, q=config.r, niter=config.psoft_svd_lowrank_niter)
            Vh = V.mT
        U, S, Vh = U[..., : config.r], S[..., : config.r] / p.scaling, Vh[..., : config.r, :]
        if config.ab_svd_init == "pissa_init":
            S = S.sqrt()
            Vh = S.unsqueeze(-1) * Vh
        p.A.copy_(Vh)
        p.B.copy_(U * S.unsqueeze(-2))

    def turn(self, p: P) -> Tensor:
        """Return ``diag(b) R diag(a) - I``, (*experts, r, r)."""
        config = self.config
        if not config.psoft_orth:
            change = p.free - _identity(p.free)
        elif not config.use_cayley_neumann:
            change = cayley(-skew(p, config.r))
        else:
            Q = skew(p, config.r)
            if config.cayley_neumann_eps is not None:
                norm = torch.linalg.matrix_norm(Q, keepdim=True)
                Q = Q * torch.where(norm > config.cayley_neumann_eps, config.cayley_neumann_eps / (norm + 1e-12), 1.0)
            change = cayley_series(Q, config.num_cayley_neumann_terms)
        identity = _identity(change)
        a, b = p.get("a"), p.get("b")
        scale = (1.0 if b is None else b.unsqueeze(-1)) * (1.0 if a is None else a.unsqueeze(-2))
        return change * scale + (identity * scale - identity)

    def delta(self, site: Site, p: P) -> LowRank:
        return LowRank(p.B @ self.turn(p).to(p.B.dtype), p.A)
