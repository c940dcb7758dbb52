"""LoRA-GA: start along the gradient of full fine-tuning (Wang et al. 2024, arXiv:2407.05000)."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.affine import Site
from inlay.core.rebase import noted_as
from inlay.core.slot import Init, KaimingUniform, Normal, zeros
from inlay.errors import ConfigError
from inlay.inits.calibration import gradients, keep_in, kept_in, spots, taken
from inlay.inits.decompose import projected
from inlay.inits.start import Factors, Given, Leading

__all__ = ["LoraGA", "preprocess_loraga"]

_NOTE = "_peft_loraga_grad"
_ROUNDS = 4


class LoraGA(Leading):
    """A and B take singular directions of the gradient of W, so that the first step goes where full training would.

    Where no gradient was measured the adapter starts in the ordinary way and the base stays as it is.
    """

    measured: ClassVar[tuple[str, ...]] = (_NOTE,)
    directions: ClassVar[int] = 2

    def fills(self, site: Site, r: int) -> tuple[Init, Init]:
        return (zeros, Normal(1.0)) if site.lookup else (KaimingUniform(), zeros)

    def factors(self, given: Given) -> Factors | None:
        found: Tensor | None = given.measured.get(_NOTE)
        if found is None:
            return None
        options = given.config.lora_ga_config
        if options is None:
            raise ConfigError("lora_ga_config: expected a LoraGAConfig with init_lora_weights='lora_ga', found None")
        site, r = given.site, given.r
        gradient = site.from_stored(found.to(given.weight)).reshape(given.weight.shape)
        U, S, Vh = projected(gradient, 2 * r, _ROUNDS, site.name)
        down, up = _directions(options.direction, r, site.name)
        A, B = Vh[..., down, :], U[..., up] * S[..., None, up]
        if options.scale == "stable":
            B = B * (given.weight.shape[-2] ** 0.25 / options.stable_gamma**0.5)
        elif options.scale == "weight_svd":
            largest = projected(given.weight, 1, _ROUNDS, site.name)[1]
            B = B * torch.where(S[..., up[:1]] > 0, largest / S[..., up[:1]], 1.0)[..., None]
        elif options.scale == "gd_scale":
            A, B = A / given.scaling, B / given.scaling
        return Factors(A, B)


def _directions(which: str, r: int, name: str) -> tuple[list[int], list[int]]:
    """Return which of 2r singular directions A and B take."""
    if which == "ArBr":
        return list(range(1, 2 * r, 2)), list(range(0, 2 * r, 2))
    if which == "A2rBr":
        return list(range(r, 2 * r)), list(range(r))
    if which == "ArB2r":
        return list(range(r)), list(range(r, 2 * r))
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    drawn = torch.randperm(2 * r, generator=generator)[:r].tolist()
    return drawn, drawn


@torch.no_grad()
def preprocess_loraga(
    model: nn.Module,
    lora_config: Any,
    train_step: Callable[[], None],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Measure the gradients that the LoRA-GA start needs, and leave them at the layers for the injection to use.

    Args:
        model: without adapters, in full precision.
        lora_config: with a ``lora_ga_config``.
        train_step: runs forward and backward passes on sample data, without an optimiser's step.
        cache_file: read instead if it is there, else written.

    Raises:
        ConfigError: there is no ``lora_ga_config``, or the file is of another model.
        UnsupportedError: a target holds its weight in a form that has no gradient.
    """
    if lora_config.lora_ga_config is None:
        raise ConfigError(
            "lora_ga_config: expected a LoraGAConfig, found None; the start needs init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)"
        )
    places = spots(model, lora_config)
    kept = kept_in(cache_file, next(model.parameters()).device)
    if kept is None:
        found = gradients(model, places, train_step)
        keep_in(cache_file, {f"{name}.{_NOTE}": gradient for name, gradient in found.items()})
    else:
        found = {spot.name: taken(kept, f"{spot.name}.{_NOTE}", cache_file) for spot in places}
    for spot in places:
        if spot.name in found:
            setattr(spot.module, noted_as(_NOTE, spot.site.parameter), found[spot.name])
