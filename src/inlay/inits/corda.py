"""CorDA: start from directions of the weight that sample inputs choose (Yang et al. 2024, arXiv:2406.05223)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.core.dtype import merge_dtype
from inlay.core.rebase import noted_as
from inlay.errors import ConfigError, UnsupportedError
from inlay.inits.calibration import Spot, in_mode, inputs_of, keep_in, kept_in, rows, spots, taken, unseen
from inlay.inits.start import Factors, Given, Leading

__all__ = ["CorDA", "CordaEigens", "preprocess_corda"]

_NOTE = "eigens"
_PARTS = ("S_WC", "U_WC", "V_WC")


@dataclass
class CordaEigens:
    """Singular triplets of ``W C``, with C the covariance of the layer's inputs, cut to the adapter's rank.

    Attributes:
        S_WC: (*groups, r).
        U_WC: (*groups, out, r).
        V_WC: (*groups, fan_in, r), multiplied with the inverse of C, so that ``U S V'`` is a part of W.
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


class CorDA(Leading):
    """``W C = U S V'``: A and B hold r of the terms of ``W = U S (V' C^-1)``, and the base the rest.

    ``ipm`` takes the largest, which the sample uses most; ``kpm`` the smallest, to keep what the model knows.
    """

    measured: ClassVar[tuple[str, ...]] = (_NOTE,)

    def factors(self, given: Given) -> Factors:
        found = given.measured.get(_NOTE)
        if found is None:
            raise ConfigError(
                f"init_lora_weights='corda': nothing was measured at {given.site.name!r} (no `eigens` there); call "
                "preprocess_corda(model, config, run_model) first, or save the trained adapter with "
                "path_initial_model_for_weight_conversion, after which it loads without"
            )
        parts = [getattr(found, part).to(given.weight) for part in _PARTS]
        blocks, (out, fan_in) = given.weight.shape[:-2], given.weight.shape[-2:]
        shapes = [(*blocks, given.r), (*blocks, out, given.r), (*blocks, fan_in, given.r)]
        for part, tensor, shape in zip(_PARTS, parts, shapes, strict=True):
            if tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"{given.site.name!r}: eigens.{part}: size mismatch: expected {shape}, found "
                    f"{tuple(tensor.shape)}; preprocess_corda, and its cache, need the model and rank of the adapter"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ConfigError(f"{given.site.name!r}: eigens.{part} holds numbers that are not finite")
        S, U, V = parts
        return given.scaled(U, S, V.mT)


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measure what the CorDA start needs, and leave it at the layers (``module.eigens``) for the injection to use.

    Every layer whose inputs can be observed takes part: linear layers, convolutions (on their patches), embeddings
    (whose covariance is diagonal) and packed attention projections.

    Args:
        model: without adapters.
        lora_config: with a ``corda_config``, whose files are read if they are there and else written.
        run_model: runs the model on sample data; not needed if a file is there.
        hooked_model: observe this model's layers of the same names instead.

    Raises:
        ConfigError: there is no ``corda_config``, no ``run_model`` where one is needed, or a file is of another model.
        UnsupportedError: the inputs of a layer cannot be observed, or hold numbers that are not finite.
    """
    options = lora_config.corda_config
    if options is None:
        raise ConfigError("corda_config: expected a CordaConfig, found None")
    places = spots(model, lora_config)
    for spot in places:
        reason = unseen(spot)
        if reason is not None:
            raise UnsupportedError(f"init_lora_weights='corda' on {spot.name!r}: {reason}")
    device = next(model.parameters()).device
    kept = kept_in(options.cache_file, device)
    if kept is not None:
        for spot in places:
            parts = {part: taken(kept, f"{spot.name}.eigens.{part}", options.cache_file) for part in _PARTS}
            _note(spot, CordaEigens(**parts))
        return
    covariances = _covariances(model, lora_config, places, run_model, hooked_model, device)
    for spot in _shown(places, options.verbose):
        _note(spot, _eigens(spot, covariances[spot.name], options.corda_method))
        if not options.prune_temporary_fields:
            held: Any = spot.module
            held.covariance_matrix, held.corda_method, held.rank = covariances[spot.name], options.corda_method, spot.r
    if options.cache_file is not None:
        named = [(spot, vars(spot.module)[_NOTE]) for spot in places]
        keep_in(options.cache_file, {f"{s.name}.eigens.{part}": getattr(e, part) for s, e in named for part in _PARTS})


def _note(spot: Spot, eigens: CordaEigens) -> None:
    setattr(spot.module, noted_as(_NOTE, spot.site.parameter), eigens)


def _shown(places: list[Spot], verbose: bool) -> Iterable[Spot]:
    if not verbose:
        return places
    from inlay.core.progress import shown

    return shown(places, "decomposing")


def _covariances(
    model: nn.Module,
    config: Any,
    places: list[Spot],
    run_model: Callable[[], None] | None,
    hooked: nn.Module | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """Return the mean of x x' over the calls of each layer, x being divided by its largest number in each call."""
    options = config.corda_config
    kept = kept_in(options.covariance_file, device)
    if kept is not None:
        return {spot.name: taken(kept, spot.name, options.covariance_file) for spot in places}
    if run_model is None:
        raise ConfigError(
            "preprocess_corda: run_model must be given where neither corda_config.cache_file nor covariance_file is "
            "there yet"
        )
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((spot.name for spot in places), 0)

    def see(spot: Spot, args: tuple[Any, ...], kwargs: Any) -> None:
        x = rows(spot, args, kwargs)
        if spot.site.lookup:
            term = torch.bincount(x, minlength=spot.site.fan_in).float()
        else:
            x = x if options.use_float16_for_covariance else x.to(merge_dtype(x.dtype))
            x = x / x.max().abs()
            term = x.mT @ x
        if not bool(torch.isfinite(term).all()):
            raise UnsupportedError(f"the inputs of {spot.name!r} give a covariance that is not finite")
        sums[spot.name] = sums[spot.name].add_(term) if spot.name in sums else term
        counts[spot.name] += 1

    observed = model if hooked is None else hooked
    watched = places
    if hooked is not None:
        there = dict(hooked.named_modules())
        watched = [replace(s, module=there[s.name]) for s in places if s.name in there]
    with in_mode(observed, False), inputs_of(watched, see):
        run_model()
    for name, count in counts.items():
        if count == 0:
            raise UnsupportedError(f"run_model never reached {name!r}, so nothing is known of its inputs")
    found = {name: total / counts[name] for name, total in sums.items()}
    keep_in(options.covariance_file, found)
    return found


def _eigens(spot: Spot, covariance: Tensor, method: str) -> CordaEigens:
    """Return r singular triplets of ``W C``; C is damped until its inverse is one."""
    weight = spot.kind.to_matrix(spot.site, spot.rows_of(spot.weight.detach()))
    weight = weight.to(merge_dtype(weight.dtype))
    if spot.site.groups > 1:
        weight = weight.unflatten(0, (spot.site.groups, -1))
    C = covariance.to(weight)
    damp = 0.01
    if C.dim() == 1:  # of one-hot rows: diagonal
        C = C + damp * C.mean()
        U, S, Vh = torch.linalg.svd(weight * C, full_matrices=False)
        V = (Vh / C).mT
    else:
        unit = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        mean = C.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        while True:
            damped = C + damp * mean * unit
            inverse = torch.linalg.inv(damped)
            if bool(((damped @ inverse - unit).flatten(-2).norm(dim=-1) < 0.05).all()):
                break
            damp *= 2
        U, S, Vh = torch.linalg.svd(weight @ damped, full_matrices=False)
        V = (Vh @ inverse).mT
    part = slice(0, spot.r) if method == "ipm" else slice(S.shape[-1] - spot.r, None)
    return CordaEigens(S[..., part].clone(), U[..., part].clone(), V[..., part].clone())
