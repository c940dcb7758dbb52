"""A cell brought to life: a small model with adapters that really change it, and ways to look at it."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from cell_layers import Pair
from cells import Cell
from torch import Tensor, nn

from inlay.core.active import set_active
from inlay.core.eject import eject
from inlay.core.inject import inject
from inlay.core.layer import AdaptedLayer
from inlay.core.merge import merge
from inlay.core.plan import plan
from inlay.core.state import State, find_state

# How many units in the last place of the largest output an output may be off. A dozen roundings on the way (cast of
# each factor, each product, the sum) leave about as many halves; sums of a hundred terms add a little in fp32, where
# torch accumulates in the output's own precision.
ULPS = 16


@dataclass
class Outcome:
    """What a forward and a backward gave: the output, and gradients by parameter name (``x`` is the input)."""

    y: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)


class Subject:
    """A cell's model with adapter ``one`` injected, its values random unless ``fresh``."""

    def __init__(self, cell: Cell, *, fresh: bool = False, layers: tuple[str, ...] = ("first", "last")) -> None:
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


def perturb(state: State, name: str, size: float = 0.3) -> None:
    """Add noise to every trainable tensor of an adapter, so that no law holds for want of an effect."""
    seen: set[int] = set()
    for layer in state.layers():
        for entry in layer.entries.get(name, ()) if isinstance(layer, AdaptedLayer) else ():
            values = layer.params(entry)
            for role, slot in entry.method.slots(entry.site).items():
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
    state = find_state(plain)
    assert state is not None
    merge(state, keep="none")
    eject(plain, state, restore=False)
    assert not any(isinstance(module, AdaptedLayer) for module in plain.modules())
    return plain


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
    if x.is_floating_point():
        assert x.grad is not None
        gradients["x"] = x.grad
    for parameter in parameters.values():
        parameter.grad = None
    return Outcome(y.detach(), gradients)


def loss(y: Tensor) -> Tensor:
    """A sum with unlike weights per element, so that swapped rows or features show."""
    weights = torch.linspace(-1.0, 2.0, y.numel(), dtype=torch.float64).cos().view(y.shape)
    return (y.double() * weights).sum()


def assert_close(
    found: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "output", ulps: float = ULPS, size: float = 0.0
) -> None:
    """Fail if ``found`` is off by more than ``ulps`` of ``dtype`` at the largest magnitude of ``expected``.

    ``size`` is the largest magnitude of what went into a result that may cancel.
    """
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    assert bool(torch.isfinite(found).all()), f"{what} is not finite"
    scale = max(float(expected.detach().abs().max()), size)
    error = float((found.detach().double() - expected.detach().double()).abs().max())
    allowed = ulps * torch.finfo(dtype).eps * scale
    assert error <= allowed, f"{what} is off by {error:.3g}, allowed {allowed:.3g} ({error / allowed * ulps:.1f} ulps)"


def assert_same_outcome(found: Outcome, expected: Outcome, dtype: torch.dtype, ulps: float = ULPS) -> None:
    assert_close(found.y, expected.y, dtype, ulps=ulps)
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in found.gradients.items():
        assert_close(gradient, expected.gradients[name], dtype, f"gradient of {name}", ulps)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer by name."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def assert_bitwise(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        # as bytes: equal() would take -0.0 for 0.0
        assert torch.equal(_bytes(found[name]), _bytes(tensor)), name


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
