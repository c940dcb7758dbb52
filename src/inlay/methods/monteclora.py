"""MonteCLoRA: A is drawn from a mixture around its value while it trains (Seth et al. 2024, arXiv:2411.04358)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.affine import Site
from inlay.core.dtype import merge_dtype
from inlay.core.lifecycle import total
from inlay.core.method import P
from inlay.core.slot import Constant, Slot
from inlay.methods.lora import LoRA

if TYPE_CHECKING:
    from inlay.core.inner import Inner

__all__ = ["MonteCLoRA"]


def unit_interval(tensor: Tensor, generator: torch.Generator) -> None:
    """Draw uniformly from [0, 1)."""
    tensor.uniform_(0.0, 1.0, generator=generator)


def identity_matrix(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a square matrix with the identity."""
    torch.nn.init.eye_(tensor)


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
        last: dict[str, Any] = {"buffer": True, "trainable": False}  # PEFT's last draws, which nothing reads here
        return {
            **slots,
            "std": site.slot(f"{place}.std_prior", "rows", unit_interval, rows=rows),
            "mixture": site.slot(f"{place}.expert_weights_prior", "samples", unit_interval, samples=n),
            "variance": site.slot(f"{place}.gaussian_var_prior", "rows rows", identity_matrix, options=last, rows=rows),
            "weights": site.slot(f"{place}.expert_weights", "samples", Constant(1 / n), options=last, samples=n),
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


def dirichlet_divergence(alpha: Tensor, prior: float) -> Tensor:
    """Return KL(Dirichlet(alpha) || Dirichlet(prior, ..., prior)), alpha (n,)."""
    total, others = alpha.sum(), torch.full_like(alpha, prior)
    volume = torch.lgamma(total) - torch.lgamma(alpha).sum()
    of_prior = torch.lgamma(others.sum()) - torch.lgamma(others).sum()
    return volume - of_prior + ((alpha - others) * (torch.digamma(alpha) - torch.digamma(total))).sum()
