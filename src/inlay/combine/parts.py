"""What adapters have at one layer, low-rank, and how that is combined."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.combine.rules import Request
from inlay.combine.svd import Factors, clamped, factorise, factorise_product
from inlay.core.affine import LowRank, Site
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.core.output_rows import put_rows
from inlay.core.sliced import Sliced
from inlay.errors import CombinationError

__all__ = ["Part", "combined", "matrix", "part_of", "stored"]


@dataclass(frozen=True)
class Part:
    """One adapter's update of one layer, ``scale * B @ A``.

    Attributes:
        weight: its weight in the combination.
        scale: its scale as it is set on the layer.
        B: (out, r / groups).
        A: (r, fan_in).
        bias: (out,), scaled, or None.
        magnitude: (out,), what DoRA's magnitude adds to the norm of the base's row, or None.
    """

    weight: float
    scale: float
    B: Tensor
    A: Tensor
    bias: Tensor | None
    magnitude: Tensor | None


def part_of(layer: AdaptedLayer, entry: Entry, weight: float = 1.0) -> Part:
    """Return what an adapter has at a layer."""
    p = layer.params(entry, whole=True)
    delta = entry.method.delta(entry.site, p)
    if not isinstance(delta, LowRank):
        raise CombinationError(f"{entry.site.name!r}: the update of adapter {entry.name!r} is not low-rank")
    B, A = delta.B.detach(), delta.A.detach()
    scale = float(entry.options["scaling"])
    bias = None if delta.bias is None else delta.bias.detach() * scale
    magnitude = p.get("magnitude")
    if magnitude is not None:
        magnitude = magnitude.detach().flatten()
        if isinstance(entry.method, Sliced):  # the other rows keep their lengths
            lengths = torch.linalg.vector_norm(layer.base_affine(whole=True).weight.to(magnitude.dtype), dim=-1)
            magnitude = put_rows(entry.method.rows, lengths, magnitude)
    return Part(weight, scale, B, A, bias, magnitude)


def combined(site: Site, parts: list[Part], request: Request) -> Factors:
    """Return the combined update's factors, with groups as a leading axis where a convolution has any."""
    rule = request.rule
    weights = [part.weight for part in parts]
    pairs = [_by_group(site.groups, part.B, part.A) for part in parts]
    if rule.space == "factors":
        sizes = [abs(part.weight * part.scale) ** 0.5 for part in parts]
        # the sign goes to one of the two, because on both it would cancel
        signed = [math.copysign(size, part.weight * part.scale) for size, part in zip(sizes, parts, strict=True)]
        A = rule.merge([A for _, A in pairs], signed)
        return rule.merge([B for B, _ in pairs], sizes), A
    if rule.space == "cat":
        return _side_by_side(pairs, parts)
    rank = (request.rank or max(part.A.shape[0] for part in parts)) // site.groups
    joined = _side_by_side(pairs, parts) if rule.sums and request.clamp is None and request.driver is None else None
    if joined is not None and joined[0].shape[-1] <= min(joined[0].shape[-2], joined[1].shape[-1]):
        U, S, Vh = factorise_product(*joined, rank)
    else:
        wide = [(torch.promote_types(B.dtype, torch.float32), B, A) for B, A in pairs]
        updates = [
            stored(site, torch.matmul(B.to(dtype), A.to(dtype))) * part.scale
            for (dtype, B, A), part in zip(wide, parts, strict=True)
        ]
        U, S, Vh = factorise(matrix(site, rule.merge(updates, weights)), rank, request.driver)
    return clamped((U * S.unsqueeze(-2), Vh), request.clamp)


def _side_by_side(pairs: list[Factors], parts: list[Part]) -> Factors:
    """Return the factors of the weighted sum: exact, and as wide as all of them together."""
    A = torch.cat([A * (part.weight * part.scale) for (_, A), part in zip(pairs, parts, strict=True)], dim=-2)
    return torch.cat([B for B, _ in pairs], dim=-1), A


def _by_group(groups: int, B: Tensor, A: Tensor) -> Factors:
    """Give a grouped convolution's factors a leading axis: (groups, out / groups, n) and (groups, n, fan_in)."""
    return (B, A) if groups == 1 else (B.unflatten(0, (groups, -1)), A.unflatten(0, (groups, -1)))


def stored(site: Site, update: Tensor) -> Tensor:
    """Return an update as the layer stores its weight, which is the order in which random pruning draws."""
    return update if site.groups > 1 else site.to_stored(update)


def matrix(site: Site, update: Tensor) -> Tensor:
    return update if site.groups > 1 else site.from_stored(update)
