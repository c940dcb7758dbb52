"""TinyLoRA: a few trained numbers steer the largest singular directions of W (Morris et al. 2026, arXiv:2602.04118)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import PeftConfig, PeftType, SavedProjectionFields, bias_setting, setting, settings
from inlay.core.affine import Affine, Dense, LowRank, Site
from inlay.core.method import Inner, Method, P
from inlay.core.registry import register_method
from inlay.core.slot import Normal, Seeded, Slot, Uniform
from inlay.errors import StateError

__all__ = ["TinyLoRA", "TinyLoraConfig"]


@settings(
    positional="r u weight_tying projection_seed save_projection init_v_bound target_modules tinylora_dropout "
    "fan_in_fan_out bias modules_to_save init_weights layers_to_transform layers_pattern"
)
class TinyLoraConfig(SavedProjectionFields, PeftConfig):
    """Configuration of TinyLoRA."""

    peft_type = PeftType.TINYLORA

    r: int = setting(default=2, doc="Singular directions of the base weight that are steered.", gt=0)
    u: int = setting(default=64, doc="Length of a trained vector.", gt=0, parameters="that many for each vector")
    weight_tying: float = setting(
        default=0.0,
        doc="0: each layer has a vector of its own; 1: all share one; between: neighbours share one in groups.",
        ge=0,
        le=1,
        parameters="(1 - weight_tying) times the number of layers says how many vectors there are",
    )
    projection_seed: int = setting(default=42, doc="Seed of the random matrices; layer n draws from the seed plus n.")
    init_v_bound: float = setting(
        default=0.02, doc="Vectors that start random are uniform between -this and this.", ge=0
    )
    tinylora_dropout: float = setting(
        default=0.0, doc="Chance that an input (of an embedding: a latent) is dropped.", ge=0, lt=1
    )
    bias: str = bias_setting("tinylora")
    init_weights: bool | str = setting(
        default=True,
        doc="True: vectors start from zeros, which change nothing; 'uniform' or False: from a uniform distribution.",
        choices=(True, False, "uniform"),
    )


class Numbered:
    """Draw the random matrices of a layer, from the seed plus the layer's number."""

    def __init__(self, numbers: dict[str, int], site: str, seed: int, std: float) -> None:
        self.order, self.site, self.seed, self.std = numbers, site, seed, std

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        Seeded(self.seed + number_of(self.order, self.site), Normal(self.std))(tensor, generator)


def number_of(numbers: dict[str, int], site: str) -> int:
    """Return a layer's place among those of an adapter."""
    if site not in numbers:
        raise StateError(f"{site!r} is none of the layers that this adapter was planned for")
    return numbers[site]


@register_method
class TinyLoRA(Method):
    """``U sqrt(S) R sqrt(S) V`` is added to ``W = U S V``, cut to r directions; ``R = sum_i v_i P_i``, P_i random."""

    config_class = TinyLoraConfig
    linear = ("v",)
    prefix = "tinylora_"
    dropout_field = "tinylora_dropout"
    config: TinyLoraConfig

    @property
    def identity(self) -> bool:
        return self.config.init_weights is True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.order: dict[str, int] = {}

    def options(self, site: Site) -> dict[str, Any]:
        return {"r": min(self.config.r, site.out, site.fan_in), "u": self.config.u}

    def shared_slots(self, sites: list[Site]) -> dict[str, Slot]:
        self.order.clear()  # the layers' initial values look here
        self.order.update((site.name, number) for number, site in enumerate(sites))
        start = self.still_or(Uniform(self.config.init_v_bound))
        used = dict.fromkeys(str(self.group(site)) for site in sites)
        return {group: Slot(f"tinylora_v.*.{group}", (self.config.u,), ("u",), start) for group in used}

    def shared_at(self, site: Site, shared: dict[str, Slot]) -> dict[str, Slot]:
        return {"v": shared[str(self.group(site))]}

    def group(self, site: Site) -> int:
        """Return which of the vectors a layer uses: as many groups as wanted, of neighbours."""
        layers = len(self.order)
        groups = max(1, round(layers * (1.0 - self.config.weight_tying)))
        return min(number_of(self.order, site.name) // max(1, layers // groups), groups - 1)

    def slots(self, site: Site) -> dict[str, Slot]:
        r, u = self.options(site).values()
        # The factors of the weight as it is stored: those of an embedding have the vocabulary on the left.
        left, right = ("fan_in r", "r out") if site.lookup else ("out r", "r fan_in")
        matrices = Numbered(self.order, site.name, self.config.projection_seed, r**-0.5)
        kept = self.config.save_projection
        return {
            "A": site.constant("tinylora_A.*", f"*experts {right}", saved=True, r=r),
            "B": site.constant("tinylora_B.*", f"*experts {left}", saved=True, r=r),
            "P": site.constant("tinylora_P.*", "u r r", matrices, saved=kept, r=r, u=u),
        }

    def prepare(self, site: Site, p: P, layer: Affine) -> None:
        weight = layer.weight.mT if site.lookup else layer.weight
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        r = p.A.shape[-2]
        root = S[..., :r].sqrt()
        p.B.copy_(U[..., :r] * root.unsqueeze(-2))
        p.A.copy_(root.unsqueeze(-1) * V[..., :r, :])

    def delta(self, site: Site, p: P) -> LowRank:
        R = torch.einsum("u,ukl->kl", p.v, p.P)
        return LowRank((R @ p.A).mT, p.B.mT) if site.lookup else LowRank(p.B @ R, p.A)

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        if not (site.lookup and p.training and self.config.tinylora_dropout):
            return super().forward(site, p, x, inner)
        latents = p.drop(inner.apply(x, Dense(p.B.mT)))  # indices cannot be dropped
        y = inner(x)
        return (y + torch.nn.functional.linear(latents, self.delta(site, p).B.to(latents.dtype))).to(y.dtype)
