"""PVeRA: VeRA whose latents are drawn from a learned normal distribution (2025, arXiv:2512.07703)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inlay.config import PeftConfig, PeftType, ProjectionFields, bias_setting, dropout_setting, setting, settings
from inlay.core.affine import Dense, LowRank, Site
from inlay.core.method import Inner, P
from inlay.core.registry import register_method
from inlay.methods.vera import VeRA

__all__ = ["PVeRA", "PveraConfig"]


@settings(
    positional="r target_modules projection_prng_key save_projection pvera_dropout d_initial fan_in_fan_out bias "
    "modules_to_save init_weights layers_to_transform layers_pattern sample_at_inference generator_seed"
)
class PveraConfig(ProjectionFields, PeftConfig):
    """Configuration of PVeRA."""

    peft_type = PeftType.PVERA

    r: int = setting(default=256, doc="Number of latents of each layer.", gt=0, parameters="2 * r + out a layer")
    d_initial: float = setting(default=0.1, doc="What the factors on means and log-variances start from.")
    init_weights: bool = setting(
        default=True, doc="Start from no change; otherwise the outer factors are 1, the inner ones random."
    )
    pvera_dropout: float = dropout_setting("what the latents read")
    bias: str = bias_setting("pvera")
    sample_at_inference: bool = setting(
        default=False, doc="Draw latents in eval mode too, instead of taking their means; a merge writes the means."
    )
    generator_seed: int | None = setting(
        default=None, doc="Seed of a stream of its own for each layer's draws; by default torch's global stream."
    )


@register_method
class PVeRA(VeRA):
    """``diag(b) B z`` is added to ``W x``: z is normal, of mean m and log-variance l, ``[m; l] = diag(d) A x``.

    In training a sample of z is taken, in eval mode its mean, which makes it VeRA with the first half of A and d.
    """

    config_class = PveraConfig
    prefix = "pvera_lambda_"
    dropout_field = "pvera_dropout"
    samples = True
    unread = ("r",)

    @property
    def rows(self) -> int:
        return 2 * int(self.config.r)

    def options(self, site: Site) -> dict[str, Any]:
        seed = self.config.generator_seed
        stream = None if seed is None else torch.Generator().manual_seed(seed)
        sampled = self.config.sample_at_inference
        return {"r": self.config.r, "sample_at_inference": sampled, "pvera_generator": stream}

    def delta(self, site: Site, p: P) -> LowRank:
        r = self.config.r
        return LowRank(p.b.unsqueeze(-1) * p.B[: site.out], p.d[:r].unsqueeze(-1) * p.A[:r, : site.fan_in])

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        if not (p.training or p.sample_at_inference):
            return super().forward(site, p, x, inner)
        y = inner(x)
        rows = (p.d.unsqueeze(-1) * p.A[:, : site.fan_in]).repeat(site.groups, 1)  # each group has latents of its own
        both = inner.apply(p.drop(x), Dense(rows))
        mean, spread = site.channels_last(both).unflatten(-1, (site.groups, self.rows)).chunk(2, -1)
        z = mean + self.noise(p, mean) * torch.exp(0.5 * spread)
        up = (p.b.unsqueeze(-1) * p.B[: site.out]).to(z.dtype).unflatten(0, (site.groups, -1))
        update = torch.einsum("...gr,gor->...go", z, up).flatten(-2)
        return (y + site.channels_back(update)).to(y.dtype)

    @staticmethod
    def noise(p: P, like: Tensor) -> Tensor:
        """Return standard normal numbers, from the layer's own stream if it has one."""
        if p.pvera_generator is None:
            return torch.randn_like(like)
        return torch.randn(like.shape, dtype=like.dtype, generator=p.pvera_generator).to(like.device)
