"""FRoD: a full-rank update in a basis that layers of one role share (doi 10.1609/aaai.v40i31.39813)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from inlay.config import PeftConfig, PeftType, ProjectionFields, bias_setting, dropout_setting, setting, settings
from inlay.core.affine import Affine, LowRank, Site
from inlay.core.joint_basis import joint_basis, role_of
from inlay.core.method import Inner, Method, P
from inlay.core.places import OffDiagonal
from inlay.core.registry import register_method
from inlay.core.slot import Constant, Normal, Slot
from inlay.errors import UnsupportedError

__all__ = ["FRoD", "FrodConfig"]


@settings(
    positional="target_modules projection_prng_key save_projection frod_dropout fan_in_fan_out bias modules_to_save "
    "init_weights layers_to_transform layers_pattern sparse_rate regularization_alpha progressbar "
    "runtime_offload_base_weight"
)
class FrodConfig(ProjectionFields, PeftConfig):
    """Configuration of FRoD."""

    peft_type = PeftType.FROD

    frod_dropout: float = dropout_setting()
    bias: str = bias_setting("frod")
    init_weights: bool = setting(default=True, doc="Start from no change; otherwise every trained tensor is random.")
    sparse_rate: float = setting(
        default=0.01,
        doc="Share of the entries off the diagonal that train.",
        ge=0.0,
        le=1.0,
        parameters="in + sparse_rate * in * in a linear layer",
    )
    regularization_alpha: float = setting(
        default=1e-3, doc="Added to the diagonal where the shared basis is computed, against ill conditioning.", ge=0.0
    )
    progressbar: bool = setting(default=True, doc="Kept for files that have it; nothing is shown.")
    runtime_offload_base_weight: bool = setting(default=False, doc="Must be False: the base weight is read.")

    def check_fields(self) -> None:
        if self.runtime_offload_base_weight:
            because = "the update is added to the base product, so the base weight stays where it is"
            raise self.wrong("runtime_offload_base_weight", f"expected False, found True: {because}")


@register_method
class FRoD(Method):
    """``W = U diag(l0) V^T`` becomes ``U (S + diag(l)) V^T``, with S sparse and V shared by layers of one role.

    What is computed is ``W + U (S + diag(l - l0)) V^T``, which is the same and exact at the start.
    """

    config_class = FrodConfig
    linear = ("l", "s")
    prefix = "frod_"
    dropout_field = "frod_dropout"
    config: FrodConfig

    def count(self, site: Site) -> int:
        """Return how many entries off the diagonal train."""
        size = site.fan_in
        most = size * size - size
        return max(1, min(int(size * size * self.config.sparse_rate), most)) if most and self.config.sparse_rate else 0

    def options(self, site: Site) -> dict[str, Any]:
        return {"r": site.out}

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        roles: dict[str, Site] = {}
        for site in sites:
            role = role_of(site.name)
            first = roles.setdefault(role, site)
            if first.fan_in != site.fan_in:
                raise UnsupportedError(
                    f"FRoD: {first.name!r} and {site.name!r} have the role {role!r} and would share a basis, and they "
                    f"have {first.fan_in} and {site.fan_in} inputs; leave one of them out"
                )
        fixed: dict[str, Any] = {"buffer": True, "trainable": False, "saved": self.config.save_projection}
        whole, slots, sizes = {**fixed, "dtype": torch.int64}, {}, []
        for role in sorted(roles):
            size, count = roles[role].fan_in, self.count(roles[role])
            sizes.append((size, count))
            places = OffDiagonal(self.config.projection_prng_key, tuple(sizes))
            slots[f"V {role}"] = Slot(f"frod_V.{role}.*", (size, size), ("fan_in", "k"), **fixed)
            slots[f"places {role}"] = Slot(f"frod_s_indices.{role}.*", (2, count), ("2", "n"), places, **whole)
            slots[f"size {role}"] = Slot(f"frod_s_size.{role}.*", (2,), ("2",), Constant(size), **whole)
        return slots

    def shared_at(self, site: Site, shared: dict[str, Slot]) -> dict[str, Slot]:
        role = role_of(site.name)
        return {name: shared[f"{name} {role}"] for name in ("V", "places")}

    def slots(self, site: Site) -> dict[str, Slot]:
        size, start = site.fan_in, self.still_or(Normal(0.1))
        slots = {
            "l": site.slot("frod_lambda_l.*", "*experts k", start, k=size),
            "s": site.slot("frod_lambda_s_values.*", "*experts n", start, n=self.count(site)),
            "U": site.constant("frod_U.*", "*experts out k", k=size),
            "l0": site.constant("frod_lambda_l_init.*", "*experts k", k=size),
        }
        if size == 1:  # a single column has nothing off the diagonal
            del slots["s"]
        return slots

    def derive_shared(self, p: P, layers: Iterable[tuple[Site, Affine]]) -> None:
        matrices: dict[str, list[Tensor]] = {}
        for site, layer in layers:
            matrices.setdefault(role_of(site.name), []).extend(layer.weight.reshape(-1, site.out, site.fan_in))
        for role, held in matrices.items():
            V = p.get(f"V {role}")
            if V is not None:
                V.copy_(joint_basis(held, self.config.regularization_alpha))

    def derive(self, site: Site, p: P, layer: Affine) -> None:
        if p.V.is_meta:
            return  # a load is to come
        V, W = p.V.double(), layer.weight.double()
        solved, failed = torch.linalg.solve_ex(V, W.mT)
        UL = W @ torch.linalg.pinv(V, rtol=1e-6).mT if bool(failed.any()) else solved.mT
        norms = UL.norm(dim=-2)
        p.l0.copy_(norms)
        p.U.copy_(torch.where(norms.unsqueeze(-2) > 1e-12, UL / norms.unsqueeze(-2), 0.0))

    def prepare(self, site: Site, p: P, layer: Affine) -> None:
        p.l.add_(p.l0)

    def resting(self, site: Site, p: P, base: Affine) -> dict[str, Tensor]:
        return {"l": p.l0}

    def middle(self, site: Site, p: P) -> Tensor:
        """Return ``S + diag(l - l0)``, (*experts, k, k)."""
        size, diagonal = site.fan_in, torch.diag_embed(p.l - p.l0)
        if size == 1:
            return diagonal
        flat = p.s.new_zeros(*site.experts, size * size).index_copy(-1, p.places[0] * size + p.places[1], p.s)
        return diagonal + flat.unflatten(-1, (size, size))

    def delta(self, site: Site, p: P) -> LowRank:
        return LowRank(p.U, self.middle(site, p) @ p.V.mT)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        if site.kernel:
            return super().forward(site, p, x, inner)
        y, t = inner(x), inner.down(p.drop(x), p.V.mT)
        return (y + inner.up(t @ self.middle(site, p).to(t.dtype).mT, p.U)).to(y.dtype)
