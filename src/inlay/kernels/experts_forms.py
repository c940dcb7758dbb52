"""Which classes of expert modules run in token space, and why an instance does not.

A class that ``transformers.integrations.use_experts_implementation`` has decorated says by flags what its forward does,
so that transformers may run it in several ways; the same flags are read here. Other classes are registered.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inlay.errors import ConfigError
from inlay.kernels.experts import BankRun, Form

__all__ = ["follows_autocast", "form_of", "register_bank", "why_not"]

_DECORATED = "transformers.integrations.moe"
_KNOWN = ("eager", "grouped_mm", "batched_mm")  # implementations of one and the same product

_by_name: dict[str, Form] = {}
_by_class: dict[type[nn.Module], Form | None] = {}


def register_bank(
    cls: type[nn.Module] | str,
    forward: Callable[..., Tensor],
    banks: tuple[str, ...],
    *,
    transposed: bool = False,
    tokens: bool = True,
) -> None:
    """Say how a class of modules uses its expert banks, so that adapters of them run in token space.

    Args:
        cls: the class, or its dotted name (``"package.module.Class"``); subclasses are not meant.
        forward: ``forward(module, run, *inputs)`` must return what the module's own forward returns, with
            ``run.project(name, rows, route)`` for each product with a bank, see ``kernels.experts.BankRun``. The
            names of its inputs are those of the module's forward, and every input is a matrix.
        banks: names of the parameters that are banks.
        transposed: ``forward`` multiplies by the stored banks as (experts, in, out), not as (experts, out, in).
        tokens: the first axis of every input is that of tokens, sample after sample, which is what choosing adapters by
            sample needs to know.

    Raises:
        ConfigError: no bank is named, or ``forward`` has no inputs.
    """
    inputs = tuple(inspect.signature(forward).parameters)[2:]
    if not banks or not inputs:
        raise ConfigError(
            f"register_bank: expected names of banks and a function of (module, run, *inputs), found banks={banks!r} "
            f"and inputs {inputs!r}"
        )
    name = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
    _by_name[name] = Form(tuple(banks), forward, inputs, transposed, tokens)
    _by_class.clear()


def form_of(module: nn.Module) -> Form | None:
    """Return how the module's class uses its banks, None where that is not known."""
    cls = type(module)
    if cls not in _by_class:
        _by_class[cls] = _by_name.get(f"{cls.__module__}.{cls.__qualname__}") or _decorated(cls)
    return _by_class[cls]


def why_not(module: Any) -> str | None:
    """Return why this module's banks are not adapted in token space, or None."""
    form = form_of(module)
    if form is None:
        return f"nothing is known of how {type(module).__name__} uses its banks (inlay.register_bank says it)"
    if "forward" in module.__dict__:
        return "the module's forward was replaced"
    if torch.compiler.is_compiling() and (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks):
        return "the module has hooks, and is compiled"
    for name in form.banks:
        bank = module._parameters.get(name)
        if bank is None or bank.dim() != 3:
            continue
        if type(bank) not in (nn.Parameter, Tensor) or bank.is_meta or not bank.is_floating_point():
            return f"{name} is no plain tensor of numbers"
        if bank.dtype.itemsize < 2:
            return f"{name} is stored in {bank.dtype}"
        if bank.requires_grad and torch.is_grad_enabled():
            return f"{name} trains itself"
    return None if form.refuse is None else form.refuse(module)


def follows_autocast(module: Any) -> bool:
    """Whether the module's own products run in the dtype of autocast, which ``grouped_mm`` does not follow."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None) != "grouped_mm"


# -- classes that transformers decorates -----------------------------------------------------------------------------


def _decorated(cls: type[nn.Module]) -> Form | None:
    """Return the form of a class whose forward ``use_experts_implementation`` made."""
    forward: Any = cls.forward
    own = getattr(forward, "__wrapped__", None)
    if own is None or getattr(forward, "__globals__", {}).get("__name__") != _DECORATED:
        return None
    inputs = tuple(inspect.signature(own).parameters)[1:]
    if len(inputs) != 3 or not hasattr(cls, "_apply_gate"):
        return None
    banks = ("gate_up_proj", "up_proj", "down_proj")
    return Form(banks, _routed, inputs, _is_transposed, refuse=_refuse)


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))


def _refuse(module: Any) -> str | None:
    if getattr(module, "_is_expert_parallel", False):
        return "the experts are spread over processes"
    chosen = getattr(module.config, "_experts_implementation", None)
    if chosen is not None and chosen not in _KNOWN:
        return f"experts_implementation={chosen!r} has kernels of its own"
    if chosen in _KNOWN[1:] and not torch.compiler.is_compiling():
        registered: Any = getattr(sys.modules.get(_DECORATED), "ALL_EXPERTS_FUNCTIONS", None)
        if registered is not None and getattr(registered[chosen], "__module__", None) != _DECORATED:
            return f"experts_implementation={chosen!r} was replaced"
    return None


def _routed(module: Any, run: BankRun, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Each token's chosen experts, weighted and summed: ``sum_j w_j down(act(up(x)))``.

    Args:
        hidden_states: (tokens, in).
        index: (tokens, choices) which experts.
        weights: (tokens, choices).
    """
    gated = getattr(module, "has_gate", True)
    biased, normed = getattr(module, "has_bias", False), getattr(module, "has_post_expert_norm", False)
    first = "gate_up_proj" if gated else "up_proj"
    route = run.route(index, run.parameter(first).shape[0])
    rows = run.project(first, hidden_states, route, spread=True)
    if biased:
        rows = rows.add_(run.parameter(f"{first}_bias").index_select(0, route.experts))
    rows = module._apply_gate(rows) if gated else module.act_fn(rows)
    scale = route.sorted(weights.reshape(-1, 1))
    early = not biased and not normed  # a factor of the narrower side, where nothing but the product comes after it
    if early:
        rows = (rows * scale).to(rows.dtype)
    rows = run.project("down_proj", rows, route)
    if biased:
        rows = rows.add_(run.parameter("down_proj_bias").index_select(0, route.experts))
    if normed:
        rows = module.post_expert_norm(rows)
    if not early:
        rows = rows * scale
    return route.summed(rows).to(hidden_states.dtype)


# -- others ----------------------------------------------------------------------------------------------------------


def _llama4(module: Any, run: BankRun, hidden_states: Tensor) -> Tensor:
    """Every token for every expert, expert after expert; the router's scores are in the input already."""
    route = run.evenly(hidden_states, run.parameter("gate_up_proj").shape[0])
    gate, up = run.project("gate_up_proj", hidden_states, route).chunk(2, dim=-1)
    return run.project("down_proj", up * module.act_fn(gate), route)


register_bank(
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts",
    _llama4,
    ("gate_up_proj", "down_proj"),
    transposed=True,
    tokens=False,
)
