"""What an adapter does to one layer's weight, as a matrix, and low-rank factors of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.combine.svd import Factors, energy_rank, factorise
from inlay.core.affine import LowRank, Site
from inlay.core.dtype import merge_dtype
from inlay.core.entry import Entry
from inlay.core.layer import AdaptedLayer
from inlay.errors import ConfigError

__all__ = ["across_groups", "change_of", "lora_factors", "no_lora_at", "place_factors"]


def no_lora_at(layer: AdaptedLayer, name: str, files: bool = True) -> str | None:
    """Return one sentence that says why no LoRA can stand for an adapter at a layer, or None.

    Args:
        layer: an adapted layer.
        name: the adapter.
        files: the LoRA is for files that PEFT can load.
    """
    site = layer.site
    if files and (not layer.kind.activation or site.elementwise):
        return f"a LoRA of its {site.kind} kind is not what PEFT's files hold"
    for entry in layer.entries[name]:
        method = entry.method
        if not method.mergeable:
            return f"{type(method).__name__} depends on the data and has no weight"
        if layer.state.policy.peft_layers and not method.additive and method.config.peft_type != "LORA":
            return f"PEFT does not convert {type(method).__name__}, whose change depends on the layer's weight"
    return None


@torch.no_grad()
def change_of(layer: AdaptedLayer, name: str, held: Sequence[Entry] | None = None) -> tuple[Tensor, Tensor | None]:
    """Return what an adapter adds to the untouched layer, in float32 or wider.

    Args:
        layer: an adapted layer.
        name: the adapter.
        held: only these of what it has there.

    Returns:
        The change of the weight, (out, fan_in), or (groups, out / groups, groups * fan_in) where it crosses the groups
        of a convolution; and that of the bias, (out,), or None where there is none.
    """
    base = layer.base_affine(whole=True)
    base = base.to(merge_dtype(base.weight.dtype))
    entries = [(entry, layer.params(entry, whole=True)) for entry in (layer.entries[name] if held is None else held)]
    if all(entry.method.additive for entry, _ in entries):  # no rounding against the weight
        total, bias = torch.zeros((), dtype=base.weight.dtype, device=base.weight.device), None
        for entry, p in entries:
            update = entry.method.update(entry.site, p)
            if isinstance(update, LowRank) and update.groups > 1:
                B, A = (factor.unflatten(0, (update.groups, -1)).to(total.dtype) for factor in (update.B, update.A))
                total = total + B @ A * update.scale
            else:
                total = total + update.dense().to(total.dtype)
            if update.bias is not None:
                added = update.bias.to(total.dtype) * update.scale
                bias = added if bias is None else bias + added
        return total, bias
    folded = base
    for entry, p in entries:
        folded = entry.method.rewrite(entry.site, p, folded, base)
    weight = folded.weight.to(base.weight.dtype) - base.weight
    if folded.bias is None or base.bias is None:
        return weight, folded.bias
    return weight, None if folded.bias is base.bias else folded.bias - base.bias


def across_groups(site: Site, weight: Tensor, like: Tensor) -> Tensor:
    """Return a weight (out, fan_in) in the form in which :func:`change_of` gives changes that cross groups."""
    if like.dim() == weight.dim():
        return weight
    own = weight.new_zeros(site.groups, site.out // site.groups, site.groups, site.fan_in)
    own.diagonal(dim1=0, dim2=2).copy_(weight.unflatten(0, (site.groups, -1)).permute(1, 2, 0))
    return own.flatten(2)


def lora_factors(site: Site, change: Tensor, rank: float) -> tuple[Tensor, Tensor]:
    """Return the best low-rank factors of a layer's change, in the shapes that LoRA's A and B have there.

    Args:
        site: the layer's shape.
        change: from :func:`change_of`.
        rank: a whole number, or a share of the energy (sum of squared singular values) in (0, 1].

    Returns:
        A (r, in, *kernel) and B (out, r / groups, *ones).

    Raises:
        ConfigError: the layer has no such rank.
    """
    if site.groups > 1 and change.dim() == 2:
        change = change.unflatten(0, (site.groups, -1))
    U, S, Vh = factorise(change, min(change.shape[-2:]))
    if isinstance(rank, float):
        n = energy_rank(S, rank)
    else:
        n, rest = divmod(rank, site.groups)
        if rest:
            raise ConfigError(
                f"rank={rank}: {site.name!r} is a convolution of {site.groups} groups, which must divide the rank"
            )
    if n > S.shape[-1]:
        raise ConfigError(
            f"rank={rank}: the largest at {site.name!r} is {S.shape[-1] * site.groups}, because its weight is "
            f"{site.out} by {site.fan_in}"
        )
    return place_factors(site, ((U * S.unsqueeze(-2))[..., :n], Vh[..., :n, :]))


def place_factors(site: Site, factors: Factors) -> tuple[Tensor, Tensor]:
    """Give factors, with groups as a leading axis where there are any, the shapes of LoRA's A and B."""
    B, A = factors
    if site.groups > 1 and A.shape[-1] == site.fan_in:  # each group reads its own channels
        own = torch.zeros(*A.shape[:2], site.groups, site.fan_in, dtype=A.dtype, device=A.device)
        own.diagonal(dim1=0, dim2=2).copy_(A.permute(1, 2, 0))
        A = own.flatten(2)
    rows, ones = B.shape[-1], (1,) * len(site.kernel)
    A = A.reshape(rows * site.groups, -1)
    shape = (site.all_channels, *site.kernel) if site.kernel else (A.shape[1],)
    return A.reshape(A.shape[0], *shape).contiguous(), B.reshape(site.out, rows, *ones).contiguous()
