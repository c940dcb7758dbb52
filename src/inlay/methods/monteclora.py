"""MonteCLoRA: A is drawn from a mixture around its value while it trains (Seth et al. 2024, arXiv:2411.04358)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.core.divergences import dirichlet_divergence
from inlay.core.dtype import merge_dtype
from inlay.core.fills import Identity
from inlay.core.lifecycle import total
from inlay.core.method import Inner, P
from inlay.core.slot import Constant, Slot, Uniform
from inlay.methods.lora import LoRA

__all__ = ["MonteCLoRA"]


class MonteCLoRA(LoRA):
    """``W + scaling * B (A + noise)`` in training, and LoRA in eval mode and when merged.

    The noise of a row of A is ``sample_scaler * sum_n w_n z_n`` with z_n normal of variance v. v is the diagonal of a
    Wishart matrix around ``exp(2 std_prior)``, and w a Dirichlet draw (in its Laplace approximation) around
    ``exp(expert_weights_prior)``. Given w, the sum is one normal draw of deviation |w| sqrt(v), and so it is drawn.
    """

    samples = True
    scales_rows = False
    adds_penalty = False

    def slots(self, site: Site) -> dict[str, Slot]:
        options = self.config.monteclora_config
        assert options is not None
        slots = super().slots(site)
        rows, n, place = slots["A"].shape[0], options.num_samples, "lora_monteclora_sampler.*"
        sizes: dict[str, Any] = {"rows": rows, "samples": n}
        drawn, even = Uniform(1.0, low=0.0), Constant(1 / n)
        return {
            **slots,
            "std": site.slot(f"{place}.std_prior", "rows", drawn, **sizes),
            "mixture": site.slot(f"{place}.expert_weights_prior", "samples", drawn, **sizes),
            # PEFT's last draws, which nothing reads here
            "variance": site.constant(f"{place}.gaussian_var_prior", "rows rows", Identity(), saved=True, **sizes),
            "weights": site.constant(f"{place}.expert_weights", "samples", even, saved=True, **sizes),
        }

    def forward(self, site: Site, p: P, x: Tensor, inner: Inner) -> Tensor:
        if not p.training:
            return super().forward(site, p, x, inner)
        options = self.config.monteclora_config
        assert options is not None
        variance, weights = self.draw(p)
        spread = options.sample_scaler * torch.linalg.vector_norm(weights) * variance.sqrt()
        noise = spread.view(-1, *[1] * (p.A.dim() - 1)) * self.noise(p.A)
        return super().forward(site, p.having(A=p.A + noise.to(p.A.dtype)), x, inner)

    def noise(self, like: Tensor) -> Tensor:
        """Return standard normal numbers."""
        return torch.randn_like(like)

    def draw(self, p: P) -> tuple[Tensor, Tensor]:
        """Return the variance of each row of A, (r,), and the weights of the mixture, (num_samples,)."""
        std, log_alpha = (t.to(merge_dtype(t.dtype)) for t in (p.std, p.mixture))
        n, inverse = log_alpha.numel(), torch.exp(-log_alpha)
        spread = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp_min(1e-6) + 1e-6
        weights = torch.softmax(log_alpha - log_alpha.mean() + spread.sqrt() * self.noise(log_alpha), -1)
        # of a Wishart matrix of r degrees around the identity: sums of r squares
        wishart = self.noise(std.new_empty(std.numel(), std.numel())).square().sum(-1)
        return (torch.exp(2 * std) * wishart).clamp_min(1e-3), weights

    def penalty(self, layers: Sequence[tuple[Site, P]]) -> Tensor | None:
        terms, further = self.monteclora_terms(layers), super().penalty(layers)
        mean = [term / len(terms) for term in terms]
        return total(mean if further is None else [*mean, further])

    def monteclora_terms(self, layers: Sequence[tuple[Site, P]]) -> list[Tensor]:
        """Return what is added to the loss for each layer in training; their mean counts."""
        options = self.config.monteclora_config
        assert options is not None
        terms = []
        for _, p in layers:
            if not p.training:
                continue
            variance, weights = self.draw(p)
            r, n, own = p.std.numel(), options.num_samples, torch.exp(2 * p.std.to(variance.dtype))
            wishart = 0.5 * r * (own - own.log() - 1).sum()
            normal = 0.5 * n * (variance - variance.log() - 1).sum()
            divergence = (
                dirichlet_divergence(torch.exp(p.mixture.to(variance.dtype)), options.dirichlet_prior)
                + wishart
                + normal
            )
            term = options.kl_loss_weight * divergence
            terms.append(term + weights.square().sum() if options.use_entropy else term)
        return terms
