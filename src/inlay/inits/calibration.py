"""The pass over sample data that data-driven starts share: what each layer reads, and what gradient its weight gets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import Affine, Site
from inlay.core.kind import Kind
from inlay.core.method import Method
from inlay.core.plan import plan
from inlay.core.sliced import Sliced, own_method, own_site
from inlay.errors import ConfigError, InlayWarning, UnsupportedError

__all__ = ["Spot", "gradients", "in_mode", "inputs_of", "keep_in", "kept_in", "rows", "spots", "taken", "unseen"]


@dataclass(frozen=True)
class Spot:
    """A layer that is going to be adapted.

    Attributes:
        name: its path, with the parameter's name where a bare parameter is meant.
        module: that holds the weight.
        site: the shape of the adapted rows.
        r: rank of the update of one block.
        method: the method there.
    """

    name: str
    module: nn.Module
    kind: Kind
    site: Site
    r: int
    method: Method

    @property
    def weight(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self.module, self.kind.weight_name)
        return found

    def rows_of(self, whole: Tensor) -> Tensor:
        """Return the adapted rows of a tensor of the weight's stored shape, as a layer of just them stores it."""
        if not isinstance(self.method, Sliced):
            return whole
        return self.kind.from_matrix(self.site, self.method.take(self.kind.to_matrix(self.site, whole)))


def spots(model: nn.Module, config: Any) -> list[Spot]:
    """Return the layers that a configuration is going to adapt in a model without adapters.

    Fields of the configuration that the model decides (``target_modules``) are filled in, as an injection does.

    Raises:
        what :func:`inlay.core.plan.plan` raises.
    """
    made = plan(model, config)
    for name, value in made.resolved.items():
        setattr(config, name, value)
    found = []
    for placement in made.placements:
        if own_method(placement.method) is made.method and placement.source is None:
            method, site = placement.method, own_site(placement.method, placement.site)
            r = placement.options["r"] // site.groups
            found.append(Spot(site.name, placement.place.base, placement.kind, site, r, method))
    return found


def unseen(spot: Spot) -> str | None:
    """Return why the inputs of a layer cannot be observed as rows that its weight multiplies, or None."""
    if spot.site.parameter is not None:
        return "a bare parameter has no inputs that could be observed"
    if spot.kind.name == "linear" and not spot.kind.all_linear:
        return "an attention layer reads its output projection and never calls it, so its inputs cannot be observed"
    if spot.site.elementwise:
        return "a norm multiplies what it has normalised itself, so the layer's inputs say nothing about its weight"
    return None


def rows(spot: Spot, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the vectors that a layer's weight multiplies for an input: (n, fan_in), or (groups, n, fan_in).

    A convolution multiplies patches, with its own stride, padding and dilation; an embedding one-hot rows, which are
    returned as the indices (n,) alone; packed attention projections the query, key and value.
    """
    site = spot.site
    if spot.kind.name == "attention":
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs)
        inputs = {id(given[role]): given[role] for role in ("query", "key", "value")}
        return torch.cat([x.detach().reshape(-1, site.fan_in) for x in inputs.values()])
    x: Tensor = (args[0] if args else next(iter(kwargs.values()))).detach()
    if site.lookup:
        return x.reshape(-1)
    if not site.kernel:
        return x.reshape(-1, site.fan_in)
    if x.dim() == len(site.kernel) + 1:
        x = x.unsqueeze(0)
    # a convolution with the unit matrix as its kernel gives the patches that the layer itself sees
    unit = torch.eye(site.fan_in, dtype=x.dtype, device=x.device).repeat(site.groups, 1)
    patches = spot.kind.run(spot.module, site, Affine(unit), x, (), {}).movedim(1, -1)
    if site.groups == 1:
        return patches.reshape(-1, site.fan_in)
    return patches.reshape(-1, site.groups, site.fan_in).movedim(1, 0)


@contextmanager
def inputs_of(places: list[Spot], see: Callable[[Spot, tuple[Any, ...], Mapping[str, Any]], object]) -> Iterator[None]:
    """Let ``see(spot, args, kwargs)`` be called with what each layer receives, without gradient, while this is open."""

    def hook(spot: Spot) -> Callable[..., None]:
        @torch.no_grad()
        def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(spot, args, kwargs)

        return seen

    with ExitStack() as stack:
        for spot in places:
            stack.callback(spot.module.register_forward_pre_hook(hook(spot), with_kwargs=True).remove)
        yield


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model in train or eval mode, and each of its modules back as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def gradients(model: nn.Module, places: list[Spot], train_step: Callable[[], object]) -> dict[str, Tensor]:
    """Return the mean gradient of each weight over the backward passes of ``train_step``, by the spots' names.

    Only these weights get gradients meanwhile; gradients and flags that were there come back.

    Raises:
        UnsupportedError: a weight is not floating, so it has no gradient.
    """
    for spot in places:
        if not spot.weight.is_floating_point():
            raise UnsupportedError(f"{spot.name!r} holds its weight in {spot.weight.dtype}, which has no gradient")
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    counts = dict.fromkeys((spot.name for spot in places), 0)
    handles = []

    def counting(name: str) -> Callable[[Tensor], None]:
        def count(parameter: Tensor) -> None:
            counts[name] += 1

        return count

    try:
        for parameter, _, _ in flags:
            parameter.grad = None
            parameter.requires_grad_(False)
        for spot in places:
            spot.weight.requires_grad_(True)
            handles.append(spot.weight.register_post_accumulate_grad_hook(counting(spot.name)))
        with in_mode(model, True), torch.enable_grad():
            train_step()
        found = {s.name: s.rows_of(s.weight.grad / counts[s.name]) for s in places if s.weight.grad is not None}
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag, grad in flags:
            parameter.requires_grad_(flag)
            parameter.grad = grad
    missed = [spot.name for spot in places if spot.name not in found]
    if missed:
        warnings.warn(
            f"train_step gave no gradient to {', '.join(map(repr, missed[:5]))}"
            f"{f' and {len(missed) - 5} more' if len(missed) > 5 else ''}, which will start in the ordinary way",
            InlayWarning,
            stacklevel=4,
        )
    return found


def kept_in(path: str | os.PathLike[str] | None, device: torch.device) -> dict[str, Tensor] | None:
    """Return the tensors of a file, None where there is none yet.

    Raises:
        ConfigError: it holds something else.
    """
    if path is None or not os.path.exists(path) or os.path.getsize(path) == 0:
        return None
    found = torch.load(path, map_location=device, weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{os.fspath(path)!r}: expected a file of tensors by name, as this function writes it")
    return found


def keep_in(path: str | os.PathLike[str] | None, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a file, whose folder is made where needed."""
    if path is not None:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        torch.save(tensors, path)


def taken(kept: Mapping[str, Tensor], key: str, path: object) -> Tensor:
    """Return a tensor of a file.

    Raises:
        ConfigError: the file was written for other layers.
    """
    if key not in kept:
        raise ConfigError(f"{path}: expected the key {key!r}; the file was written for another model or other targets")
    return kept[key]
