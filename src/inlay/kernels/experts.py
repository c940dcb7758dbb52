"""Expert banks in token space: adapters of stacked weights as narrow products on routed rows.

Written into the weight, a low-rank update of a bank takes a matrix for every expert in each forward, with a gradient of
the same size. Where it is known how a class of modules routes its rows, the update is multiplied into the rows instead.
What a class does is a :class:`Form`: its forward once more, with each product of a bank left to :class:`BankRun`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.affine import LowRank
from inlay.kernels.experts_product import bank_product
from inlay.kernels.experts_route import Route
from inlay.kernels.masks import Mask

__all__ = ["BankRun", "BankUpdate", "Form", "run_in_token_space"]


@dataclass(frozen=True)
class BankUpdate:
    """What one adapter adds to one bank.

    Attributes:
        delta: B (experts, out, r) and A (experts, r, in), as the adapter's site has them.
        drop: probability of dropping an element of the update's input in this forward.
        transposed: whether the site reads the stored bank as (experts, in, out).
    """

    delta: LowRank
    drop: float = 0.0
    transposed: bool = False


@dataclass(frozen=True)
class Form:
    """How a class of modules uses its banks.

    Attributes:
        banks: the parameters that are banks, (experts, out, in) or (experts, in, out).
        forward: ``forward(module, run, *inputs)`` does what the module's own forward does, with ``run.project`` for
            each product with a bank.
        inputs: names of the module's inputs, in order.
        transposed: whether ``forward`` multiplies by the stored banks as (experts, in, out); or a function that says
            so of a module.
        tokens: whether the first axis of every input is that of tokens, sample after sample.
        refuse: ``refuse(module)`` says why this instance is not run so, or None.
    """

    banks: tuple[str, ...]
    forward: Callable[..., Tensor]
    inputs: tuple[str, ...]
    transposed: bool | Callable[[Any], bool] = False
    tokens: bool = True
    refuse: Callable[[Any], str | None] | None = None

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor] | None:
        """Return the inputs of a call in order; None where it is not called with matrices alone."""
        if len(args) > len(self.inputs):
            return None
        rest = self.inputs[len(args) :]
        if len(kwargs) != len(rest) or any(name not in kwargs for name in rest):
            return None
        bound = [*args, *(kwargs[name] for name in rest)]
        return bound if all(isinstance(value, Tensor) and value.dim() == 2 for value in bound) else None

    def in_out(self, module: nn.Module) -> bool:
        """Whether the module multiplies by its stored banks as (experts, in, out)."""
        return self.transposed if isinstance(self.transposed, bool) else self.transposed(module)


class BankRun:
    """One forward of a module of experts: what a :class:`Form` multiplies with.

    Args:
        module: the module whose forward it is.
        tensors: tensors that stand in for parameters of that name.
        updates: what the adapters add, by the bank's name.
        in_out: whether banks are stored (experts, in, out).
    """

    def __init__(
        self,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        updates: Mapping[str, Sequence[BankUpdate]],
        in_out: bool,
        autocast: bool = True,
    ) -> None:
        self._module = module
        self._tensors = tensors
        self._updates = updates
        self._in_out = in_out
        self._autocast = autocast

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the module, or what stands in for it."""
        found = self._tensors.get(name)
        if found is None:
            found = self._module._parameters[name]
        assert found is not None
        return found

    def route(self, index: Tensor, experts: int) -> Route:
        """Sort rows by the experts, (tokens, choices), that were chosen for each token."""
        return Route(index, experts)

    def evenly(self, x: Tensor, experts: int) -> Route:
        """Return the route of rows that come sorted by expert, the same number for each."""
        return Route.even(x.shape[0], experts, x.device)

    def project(self, name: str, x: Tensor, route: Route, *, spread: bool = False) -> Tensor:
        """Multiply rows by the bank of that name, and by what adapters add to it.

        Args:
            x: sorted rows (S, in); or tokens (T, in) with ``spread``, which go to the rows of their experts.

        Returns:
            (S, out), in the dtype of the bank (or that of autocast, where the module's own products would follow it).
        """
        bank = self.parameter(name)
        weight = bank if self._in_out else bank.mT
        dtype = bank.dtype
        if self._autocast and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        updates = self._updates.get(name, ())
        plain = [(*self._factors(u, 1.0, route), None) for u in updates if not u.drop]
        parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
        if plain:
            A, B = zip(*((A, B) for A, B, _ in plain), strict=True)
            parts.append((_joined(A, dtype), _joined(B, dtype), None))
        for update in updates:
            if update.drop:
                dropped, scale = _dropped(x, update.drop)
                A1, B1 = self._factors(update, scale, route)
                parts.append((_joined([A1], dtype), _joined([B1], dtype), dropped))
        if not parts:
            return bank_product(x, weight, None, None, route, spread)
        first, *others = parts
        y = bank_product(x, weight, first[0], first[1], route, spread, first[2])
        for A2, B2, other in others:  # each has a dropout of its own
            assert other is not None
            y = y + bank_product(other, None, A2, B2, route, spread)
        return y

    def _factors(self, update: BankUpdate, scale: float, route: Route) -> tuple[Tensor, Tensor]:
        """Return what shrinks, (experts, r, in), and what expands, (experts, r, out), with the scale."""
        delta = update.delta
        A, B = delta.A, delta.B.mT
        if route.segments.few:  # the experts without rows are not touched
            used = torch.tensor(route.segments.used, dtype=torch.long, device=A.device)
            A, B = A.index_select(0, used), B.index_select(0, used)
        factor = delta.scale * scale
        if not (isinstance(factor, float) and factor == 1.0):
            B = B * factor
        return (A, B) if update.transposed == self._in_out else (B, A)


def _joined(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return factors (experts, r, n) side by side in the rank axis, in memory one expert after the other."""
    if len(factors) == 1:
        return factors[0].to(dtype).contiguous()
    return torch.cat([factor.to(dtype) for factor in factors], 1)


def _dropped(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Return x with elements dropped, and the scale that is left for the update."""
    if torch.compiler.is_compiling():
        return torch.nn.functional.dropout(x, p), 1.0
    mask = Mask(x, p, again=False)
    return x * mask.bits(), mask.scale


def run_in_token_space(
    form: Form,
    module: nn.Module,
    tensors: dict[str, Tensor],
    updates: Mapping[str, Sequence[BankUpdate]],
    inputs: Sequence[Tensor],
    autocast: bool,
) -> Any:
    """Run a module of experts with updates of its banks, its hooks included.

    Args:
        tensors: what stands in for other parameters.
        updates: by the bank's name.
        inputs: as ``form.bind`` returned them.
        autocast: whether the module's own products follow autocast.
    """
    run = BankRun(module, tensors, updates, form.in_out(module), autocast)
    if torch.compiler.is_compiling():
        return form.forward(module, run, *inputs)
    clone = object.__new__(type(module))  # as core.clone makes it, but with the very parameters
    clone.__dict__.update(module.__dict__)
    clone.__dict__.update(tensors)
    clone.__dict__["forward"] = lambda *given: form.forward(clone, run, *given)
    return clone(*inputs)
