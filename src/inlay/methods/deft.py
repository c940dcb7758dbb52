"""DEFT: take a subspace of its outputs from a layer, and give it another one (Kumar et al. 2025, NeurIPS)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import MatrixTargetFields, PeftConfig, PeftType, bias_setting, dropout_setting, setting, settings
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.dtype import merge_dtype
from inlay.core.method import Inner, P
from inlay.core.reading import ReadsBase
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Slot, zeros

__all__ = ["DEFT", "DeftConfig"]


@settings(
    positional="r target_modules exclude_modules decomposition_method init_scale alpha para fan_in_fan_out "
    "deft_dropout init_weights layers_to_transform layers_pattern bias modules_to_save"
)
class DeftConfig(MatrixTargetFields, PeftConfig):
    """Configuration of DEFT."""

    peft_type = PeftType.DEFT

    r: int = setting(
        default=8,
        doc="Directions of the output that are taken; a layer with fewer outputs has as many as those.",
        gt=0,
        parameters="proportional: r * (in + out) a layer, r * out with para",
    )
    decomposition_method: str = setting(
        default="relu",
        doc="How the projection follows from P: P relu(P)^T ('relu'), or on the space of its columns ('qr').",
        choices=("relu", "qr"),
    )
    init_scale: float = setting(default=1.0, doc="Scale of what is given, where it starts at random.")
    alpha: int | None = setting(default=None, doc="Numerator of the scale alpha / r of what is given; 1 without.", gt=0)
    para: bool = setting(
        default=False, doc="Only take, give nothing (PaRa); it changes the output from the start.", parameters="no R"
    )
    deft_dropout: float = dropout_setting("what is given")
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise what is given is random.")
    bias: str = bias_setting("deft")


@register_method
class DEFT(ReadsBase):
    """``(I - Q S^T) W + s Q R``, s = alpha / r; Q = P and S = relu(P), or Q = S = the orthonormal columns of P.

    W is the untouched weight; R starts as ``S^T W / s``, so that nothing changes.
    """

    config_class = DeftConfig
    prefix = "deft_"
    dropout_field = "deft_dropout"
    config: DeftConfig

    @property
    def identity(self) -> bool:
        return self.config.init_weights and not self.config.para

    def options(self, site: Site) -> dict[str, Any]:
        r, alpha = min(self.config.r, site.out), self.config.alpha
        return {"deft_r": r, "deft_scaling": 1.0 if alpha is None else alpha / r}

    def note(self, site: Site) -> str | None:
        if self.config.r > site.out:
            return f"it has {site.out} outputs, so {site.out} directions are taken instead of r={self.config.r}"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        r = self.options(site)["deft_r"]
        slots = {"P": site.slot("deft_P.*", "*experts out r", Normal(0.02), r=r)}
        if not self.config.para:  # zeros stand in until prepare
            start = zeros if self.config.init_weights else Normal(0.02 * self.config.init_scale)
            slots["R"] = site.slot("deft_R.*", "*experts r fan_in", start, r=r)
        return slots

    def prepare(self, site: Site, p: P, layer: Affine) -> Affine | None:
        if self.identity:
            _, S = self.projection(p)
            p.R.copy_(self.taken(S, layer) / p.deft_scaling)
        return None

    def projection(self, p: P) -> tuple[Tensor, Tensor]:
        """Return Q and S, (*experts, out, r) each, in at least float32."""
        P = p.P.to(merge_dtype(p.P.dtype))
        if self.config.decomposition_method == "relu":
            return P, P.relu()
        Q, _ = torch.linalg.qr(P)
        return Q, Q

    @staticmethod
    def taken(S: Tensor, base: Affine) -> Tensor:
        """Return ``S^T W``, (*experts, r, fan_in)."""
        return S.mT @ base.weight.to(S.dtype)

    def change(self, site: Site, p: P, base: Affine) -> LowRank:
        Q, S = self.projection(p)
        taken, R = self.taken(S, base), p.get("R")
        return LowRank(Q, -taken if R is None else R.to(S.dtype) * p.deft_scaling - taken)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        dropped, R = p.drop(x), p.get("R")
        Q, S = self.projection(p)
        given = None if R is None else LowRank(Q, R.to(S.dtype) * p.deft_scaling)
        if inner.is_base and site.groups == 1 and not site.elementwise:  # the layer has made the product with W
            y, bias = inner(x), inner.bias()
            plain, dtype = y if bias is None else y - site.along_output(bias), inner.product_dtype(y, Q.dtype)
            along = torch.einsum("...o,or->...r", site.channels_last(plain).to(dtype), S.to(dtype))
            taken = torch.einsum("...r,or->...o", along, Q.to(dtype))
            y = (y - site.channels_back(taken)).to(y.dtype)
        elif dropped is x:
            return inner.plus(x, P(), self.change(site, p, inner.base_affine()))
        else:
            y = inner.plus(x, P(), LowRank(Q, -self.taken(S, inner.base_affine())))
        return y if given is None else (y + inner.apply(dropped, given)).to(y.dtype)
