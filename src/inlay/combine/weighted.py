"""A new adapter as the weighted combination of others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import nn

from inlay.combine.as_lora import add_as_lora
from inlay.combine.ia3 import add_ia3
from inlay.combine.lora import add_lora
from inlay.combine.own_form import add_in_own_form, no_own_form
from inlay.combine.placing import check_layers
from inlay.combine.rules import Request, rule
from inlay.core.state import State
from inlay.errors import (
    AdapterNameError,
    CombinationError,
    ConfigError,
    ConfigTypeError,
    NoCombinationError,
    UnknownFieldError,
)

__all__ = ["add_weighted"]


def add_weighted(
    model: nn.Module,
    state: State,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> bool:
    """Combine adapters of a model into a new one, which is neither active nor trains.

    LoRAs make a LoRA and (IA)^3 adapters another of theirs. Adapters of any other method whose update is linear in its
    tensors (spectra, single entries, circulant kernels, shared blocks, norms, token rows, ...) are combined by these
    with ``linear``, ``cat`` and the types that thin out, if all else of theirs is equal. All others, and adapters of
    different methods, become one LoRA of what they change in each layer: exactly with ``cat``, at a rank that is
    asked for with the types that end in ``svd``.

    Args:
        model: the bare model.
        state: its state.
        adapters: names of adapters.
        weights: a number for each.
        adapter_name: the new adapter's name.
        combination_type: (LoRA) ``cat`` is the exact weighted sum, as wide as all ranks together. ``svd`` is the
            nearest update to it of rank ``svd_rank``. ``linear`` adds up A with A and B with B: fast, and wrong by
            the cross terms. ``ties``, ``dare_linear``, ``dare_ties`` and ``magnitude_prune`` thin the factors out
            first; the same with ``_svd`` behind them work on whole updates. One adapter alone is scaled exactly.
        svd_rank: rank of the result of the types that end in ``svd``; by default the largest of the adapters', which
            only low-rank updates have.
        svd_clamp: bound the factors of a decomposition by this quantile of their entries, 0 to 1.
        svd_full_matrices: taken for callers of PEFT. The vectors that it adds are cut off again, so none are computed.
        svd_driver: cuSOLVER's method, for updates on CUDA.
        density: share of entries that thinning out keeps.
        majority_sign_method: how the TIES types elect a sign: ``total`` or ``frequency``.

    Returns:
        Whether there is a new adapter. Under the policy ``peft`` an existing name changes nothing.

    Raises:
        AdapterNameError: the name is taken (policy ``inlay``) or unsafe.
        UnknownAdapterError: an adapter that is not there.
        NoCombinationError: adapters that cannot be combined like this, or a layer that no LoRA can stand for.
        CombinationError: adapters that do not fit together; the message says why.
        ConfigError, ConfigTypeError: a wrong number. In each case the model is as before.
    """
    if adapter_name in state.records:
        if state.policy.lenient_combining:
            return False
        raise AdapterNameError(f"there is already an adapter {adapter_name!r}; delete it first or take another name")
    weights = _checked(state, adapters, weights)
    check_layers(state, adapters)
    options = (combination_type, svd_rank, svd_clamp, svd_full_matrices, svd_driver, density, majority_sign_method)
    types = _methods(state, adapters)
    if types == {"IA3"}:
        if options != ("svd", None, None, True, None, None, "total"):
            raise UnknownFieldError("add_weighted_adapter: (IA)^3 factors are added up, and no other option applies")
        add_ia3(model, state, adapters, weights, adapter_name)
        return True
    if svd_rank is not None and (not isinstance(svd_rank, int) or svd_rank < 1):
        raise ConfigError(f"svd_rank: expected a whole number above 0, found {svd_rank!r}")
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        raise ConfigError(f"svd_clamp: expected a quantile from 0 to 1, found {svd_clamp!r}")
    if len(adapters) == 1:  # one alone is only scaled, unless another rank is asked for
        combination_type = "linear" if svd_rank is None or state.policy.lenient_combining else "svd"
    chosen = rule(combination_type, density, majority_sign_method)
    request = Request(adapters, weights, adapter_name, chosen, svd_rank, svd_clamp, svd_driver)
    _add(model, state, request, types)
    return True


def _add(model: nn.Module, state: State, request: Request, types: set[str]) -> None:
    """Combine adapters: LoRAs by their factors, others in their own form where they have one, or into a LoRA."""
    if types == {"LORA"}:
        add_lora(model, state, request)
        return
    space, exact = request.rule.space, request.rule.sums
    apart = no_own_form(model, state, request.adapters) if space != "matrix" else "not asked for"
    if apart is None:
        add_in_own_form(model, state, request)
    elif space == "factors" and len(request.adapters) == 1 and exact:
        add_as_lora(model, state, dataclasses.replace(request, rule=rule("cat", None, "total")))
    elif space == "factors":
        raise NoCombinationError(
            f"combination_type={request.rule.name!r} combines tensors of one form with each other, and {apart}; 'cat' "
            "and the types that end in 'svd' combine what the adapters change into a LoRA"
        )
    else:
        add_as_lora(model, state, request)


def _checked(state: State, adapters: Sequence[str], weights: Sequence[float]) -> list[float]:
    """Return the weights as numbers, one for each adapter."""
    if isinstance(adapters, str):
        raise ConfigTypeError(f"adapters: expected a list of names, found the string {adapters!r}")
    if not adapters:
        raise CombinationError("adapters: expected at least one name, found none")
    for name in adapters:
        state.record(name)
    if len(weights) != len(adapters):
        raise CombinationError(f"weights: expected {len(adapters)}, one for each adapter, found {len(weights)}")
    numbers = [float(weight) for weight in weights]
    for name, number in zip(adapters, numbers, strict=True):
        if not math.isfinite(number):
            raise ConfigError(f"weights: expected a finite number for {name!r}, found {number}")
    return numbers


def _methods(state: State, adapters: Sequence[str]) -> set[str]:
    """Return the methods of adapters that can be weighted."""
    types: set[str] = set()
    for name in adapters:
        record = state.record(name)
        types.add(str(getattr(record.config.peft_type, "value", record.config.peft_type)))
        if record.method.bias_mode() != "none":
            raise CombinationError(
                f"adapter {name!r} trains biases of the base model (bias={record.config.bias!r}), which all adapters "
                "share, so they cannot be weighted"
            )
        if not record.method.mergeable:
            raise NoCombinationError(
                f"adapter {name!r} is of {type(record.method).__name__}, which depends on the data, so it has no "
                "weight that could be combined"
            )
    return types
