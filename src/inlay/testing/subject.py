"""A trial brought to life: a small model with adapters that really change it, and ways to look at it."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from inlay.core.active import set_active
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.core.state import State, find_state
from inlay.core.targets import base_parameters
from inlay.errors import LawError
from inlay.testing.layers import Pair

__all__ = [
    "ULPS",
    "Outcome",
    "Subject",
    "Trial",
    "assert_bitwise",
    "assert_close",
    "assert_same_outcome",
    "exact_input",
    "hold",
    "loss",
    "outcome",
    "perturb",
    "same_keys",
    "state_of",
    "tensors_of",
    "written",
]

# How many units in the last place of the largest output an output may be off. A dozen roundings on the way (cast of
# each factor, each product, the sum) leave about as many halves; sums of a hundred terms add a little in fp32, where
# torch accumulates in the output's own precision.
ULPS = 16


class Trial(Protocol):
    """What a law is tried on: a method, a layer and a dtype.

    Attributes:
        dtype: of the base model.
        axis: where the samples of a batch are.
        padding: the index that torch gives no gradient.
        unmergeable: why the adapter cannot be written into the weight, or None.
        fresh_changes: whether a fresh adapter changes the output, by its config.
        renormalises: a lookup writes to the table that it reads (``max_norm``).
        numeric: whether finite differences see the gradient: nothing is held constant in backward on purpose.
    """

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def axis(self) -> int: ...
    @property
    def padding(self) -> int | None: ...
    @property
    def unmergeable(self) -> str | None: ...
    @property
    def fresh_changes(self) -> bool: ...
    @property
    def renormalises(self) -> bool: ...
    @property
    def numeric(self) -> bool: ...

    def model(self) -> Pair:
        """Return the base model, with the same values each time."""

    def batch(self) -> Tensor:
        """Return inputs for ``BATCH`` samples."""

    def config(self, method: str | None = None, layers: tuple[str, ...] = ("first", "last")) -> Any:
        """Return the config of the method under trial, or of another one that the trial knows."""

    @property
    def companion(self) -> str:
        """A method for a second adapter of the same layers."""


@dataclass
class Outcome:
    """What a forward and a backward gave: the output, and gradients by parameter name (``x`` is the input)."""

    y: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Subject:
    """A trial's model with adapter ``one`` injected, its values random unless ``fresh``."""

    def __init__(self, cell: Trial, *, fresh: bool = False, layers: tuple[str, ...] = ("first", "last")) -> None:
        self.cell = cell
        self.model = cell.model()
        self.untouched = copy.deepcopy(self.model)
        self.x = cell.batch()
        self.state = inject(plan(self.model, cell.config(layers=layers), "one"), seed=7)
        if not fresh:
            perturb(self.state, "one")

    def add(self, name: str, method: str | None = None, layers: tuple[str, ...] = ("first", "last")) -> None:
        """Inject a second adapter, of another method by default."""
        method = method or self.cell.companion
        inject(plan(self.model, self.cell.config(method, layers), name), seed=7)
        perturb(self.state, name)

    def activate(self, *names: str) -> None:
        set_active(self.state, names, trainable=True)

    def exact(self) -> Pair:
        """The same model in float64, with the same values: the reference for every lower precision."""
        return copy.deepcopy(self.model).double()

    def base_output(self) -> Tensor:
        return self.untouched(self.x).detach()

    @torch.no_grad()
    def bare_output(self) -> Tensor:
        """The output of the base as it stands, with what the adapter's start changed in it; nothing may be merged."""
        changed = self.state.records["one"].rebased
        if not changed:
            return self.base_output()
        bare = copy.deepcopy(self.untouched)
        mine, present = dict(bare.named_parameters()), base_parameters(self.model)
        for name in changed:
            mine[name].copy_(present[name])
        return bare(self.x)

    def largest(self) -> float:
        """The largest magnitude of the base's output."""
        return float(self.base_output().abs().max())


def perturb(state: State, name: str, size: float = 0.3) -> None:
    """Add noise to every trainable tensor of an adapter, so that no law holds for want of an effect."""
    seen: set[int] = set()
    shared = {slot.place: slot for slot in state.record(name).shared.values()}
    for layer in state.layers():
        for entry in layer.entries.get(name, ()) if isinstance(layer, AdaptedLayer) else ():
            values = layer.params(entry)
            common = [(role, shared[place]) for role, *rest in entry.shared if (place := (rest[0], rest[1])) in shared]
            for role, slot in (*entry.method.slots(entry.site).items(), *common):
                tensor = getattr(values, role)
                if not slot.trainable or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                seed = zlib.crc32(f"{name} {layer.site.name} {slot.key}".encode())
                noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
                with torch.no_grad():
                    tensor.add_(size * noise.to(tensor.dtype))


def written(model: nn.Module) -> nn.Module:
    """Return the plain torch model whose weights are the result of ``rewrite``; no adapter code runs in it."""
    plain = copy.deepcopy(model)
    state = state_of(plain)
    merge(state, keep="none")
    eject(plain, state, restore=False)
    hold(not any(isinstance(m, AdaptedLayer) for m in plain.modules()), "an adapted layer is left after ejecting")
    return plain


def state_of(model: nn.Module) -> State:
    """Return the state of a model that has adapters.

    Raises:
        LawError: it has none.
    """
    state = find_state(model)
    if state is None:
        raise LawError("the model has no adapters")
    return state


def outcome(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Outcome:
    """Run a forward and a backward (of a fixed weighted sum of the outputs) and collect the gradients."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.grad = None
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
    y = model(x) if run is None else run(x)
    if y.requires_grad:
        loss(y).backward()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    if x.grad is not None:
        gradients["x"] = x.grad
    elif x.is_floating_point():
        raise LawError("the input has no gradient")
    for parameter in parameters.values():
        parameter.grad = None
    return Outcome(y.detach(), gradients)


def loss(y: Tensor) -> Tensor:
    """A sum with unlike weights per element, so that swapped rows or features show."""
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).cos().view(y.shape)
    return (y.double() * weights).sum()


def hold(law: bool, what: str) -> None:
    """Raise unless a statement is true.

    Raises:
        LawError: it is not.
    """
    if not law:
        raise LawError(what)


def assert_close(
    found: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "output", ulps: float = ULPS, size: float = 0.0
) -> None:
    """Fail if ``found`` is off by more than ``ulps`` of ``dtype`` at the largest magnitude of ``expected``.

    ``size`` is the largest magnitude of what went into a result that may cancel.

    Raises:
        LawError: it is.
    """
    hold(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    hold(bool(torch.isfinite(found).all()), f"{what} is not finite")
    scale = max(float(expected.detach().abs().max()), size)
    error = float((found.detach().double() - expected.detach().double()).abs().max())
    allowed = ulps * torch.finfo(dtype).eps * scale
    if error > allowed:
        share = error / allowed * ulps if allowed else torch.inf
        raise LawError(f"{what} is off by {error:.3g}, allowed {allowed:.3g} ({share:.1f} ulps)")


def assert_same_outcome(found: Outcome, expected: Outcome, dtype: torch.dtype, ulps: float = ULPS) -> None:
    """Fail if outputs or gradients differ by more than ``ulps``, or not the same tensors have a gradient."""
    assert_close(found.y, expected.y, dtype, ulps=ulps)
    same_keys(found.gradients, expected.gradients, "tensors with a gradient")
    for name, gradient in found.gradients.items():
        assert_close(gradient, expected.gradients[name], dtype, f"gradient of {name}", ulps)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer by name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def same_keys(found: dict[str, Any], expected: dict[str, Any], what: str) -> None:
    """Fail if two dicts have different keys.

    Raises:
        LawError: they have.
    """
    if found.keys() != expected.keys():
        lacking, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise LawError(f"{what}: missing {lacking}, unexpected {more}")


def assert_bitwise(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Fail unless the tensors are equal bit by bit, and of the same names and dtypes.

    Raises:
        LawError: they are not.
    """
    same_keys(found, expected, "tensors")
    for name, tensor in expected.items():
        hold(found[name].dtype == tensor.dtype, f"{name} is {found[name].dtype}, expected {tensor.dtype}")
        # as bytes: equal() would take -0.0 for 0.0
        hold(torch.equal(_bytes(found[name]), _bytes(tensor)), f"{name} is not bitwise what it was")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def exact_input(x: Tensor) -> Tensor:
    """Return an input for a float64 model."""
    return x.double() if x.is_floating_point() else copy.copy(x)
