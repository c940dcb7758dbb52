"""Super-Tuning: single weights, chosen by their size, are trained; the rest stands still (arXiv:2607.09287)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import PeftConfig, PeftType, SavedModulesField, TargetField, dropout_setting, setting, settings
from inlay.core.affine import Affine, Delta, Dense, LowRank, Site
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import KaimingUniform, Normal, Slot, zeros
from inlay.core.structured import Sparse

__all__ = ["SuperTuning", "SupertuningConfig"]


@settings(
    positional="target_modules modules_to_save sparsity select_top r lora_alpha lora_dropout init_weights "
    "save_precomputed_indices"
)
class SupertuningConfig(TargetField, SavedModulesField, PeftConfig):
    """Configuration of Super-Tuning."""

    peft_type = PeftType.SUPERTUNING

    sparsity: float = setting(
        default=0.99,
        doc="Share of the weights that stand still.",
        ge=0.0,
        lt=1.0,
        parameters="(1 - sparsity) * in * out a linear layer",
    )
    select_top: bool = setting(default=True, doc="Train the largest weights by magnitude; otherwise the smallest.")
    r: int | None = setting(
        default=None, doc="Rank of a LoRA beside the single weights (Supra).", gt=0, parameters="adds r * (in + out)"
    )
    lora_alpha: float | None = setting(default=None, doc="Numerator of the LoRA's scale alpha / r; 2 * r by default.")
    lora_dropout: float = dropout_setting("the LoRA")
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise every trained tensor is random.")
    save_precomputed_indices: bool = setting(
        default=True, doc="Keep the places in the checkpoint; otherwise they are found again in the base weight."
    )

    def check_fields(self) -> None:
        if self.r is None and self.lora_alpha is not None:
            because = "because r is None and there is no LoRA to scale"
            raise self.wrong("lora_alpha", f"expected None, {because}; found {self.lora_alpha!r}")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.r
        if not self.save_precomputed_indices:
            self.warn(
                "save_precomputed_indices is False: the places are found again on loading, and are others if the base "
                "weights differ at all."
            )


@register_method
class SuperTuning(Method):
    """``W + S`` with S zero but at the n largest (or smallest) entries of W; with ``r``, ``+ alpha / r * B A``."""

    config_class = SupertuningConfig
    prefix = "supertuning_"
    dropout_field = "lora_dropout"
    config: SupertuningConfig

    @property
    def linear(self) -> tuple[str, ...]:
        return ("values",) if self.config.r is None else ()

    def options(self, site: Site) -> dict[str, Any]:
        r, alpha = self.config.r, self.config.lora_alpha
        return {} if r is None or alpha is None else {"r": r, "lora_alpha": alpha, "scaling": alpha / r}

    def count(self, site: Site) -> int:
        """Return how many entries of a weight train."""
        return int(site.out * site.fan_in * (1 - self.config.sparsity))

    def refuse(self, site: Site) -> str | None:
        if self.count(site) < 1:
            size = site.out * site.fan_in
            return f"sparsity={self.config.sparsity} leaves none of its {size} weights to train; lower it"
        return None

    def slots(self, site: Site) -> dict[str, Slot]:
        n, r, start = self.count(site), self.config.r, self.config.init_weights
        kept = self.config.save_precomputed_indices
        slots = {
            "values": site.slot("supertuning_values.*", "*experts n", zeros if start else Normal(1.0), n=n),
            "indices": site.constant("supertuning_indices.*", "*experts n", saved=kept, dtype=torch.int32, n=n),
        }
        if r is not None:
            A, B = "supertuning_lora_A.*.weight", "supertuning_lora_B.*.weight"
            still, drawn = zeros if start else KaimingUniform(fan=r), KaimingUniform(fan=site.fan_in)
            if site.lookup:  # one-hot inputs read columns of A, which must not start at random
                still, drawn = KaimingUniform(fan=r), still
            slots["A"] = site.slot(A, "*experts r fan_in", drawn, options={"leaf": "down"}, r=r)
            slots["B"] = site.slot(B, "*experts out r", still, options={"leaf": "up"}, r=r)
        return slots

    def choose(self, p: P, layer: Affine) -> None:
        """Find the places in the base weight."""
        found = layer.weight.abs().flatten(-2).topk(p.indices.shape[-1], largest=self.config.select_top)
        p.indices.copy_(found.indices)

    def prepare(self, site: Site, p: P, layer: Affine) -> None:
        if self.config.save_precomputed_indices:
            self.choose(p, layer)

    def derive(self, site: Site, p: P, layer: Affine) -> None:
        if not self.config.save_precomputed_indices:
            self.choose(p, layer)

    def entries(self, site: Site, p: P) -> Delta:
        """Return the update of single entries."""
        places = p.indices.long()
        if site.experts:
            flat = p.values.new_zeros(*site.experts, site.out * site.fan_in).scatter(-1, places, p.values)
            return Dense(flat.unflatten(-1, (site.out, site.fan_in)))
        rows = torch.div(places, site.fan_in, rounding_mode="floor")
        return Sparse(rows, places % site.fan_in, p.values, site.out, site.fan_in)

    def update(self, site: Site, p: P) -> Delta:
        single = self.entries(site, p)
        if self.config.r is None:
            return single
        return Dense(single.dense() + LowRank(p.B, p.A).scaled(p.scaling).dense())

    delta = update

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        single = self.entries(site, p)
        if self.config.r is None:
            return inner.plus(x, p, single)
        y = inner.plus(x, p, LowRank(p.B, p.A).scaled(p.scaling))  # whose dropout is the LoRA's alone
        return (y + inner.apply(x, single)).to(y.dtype)
