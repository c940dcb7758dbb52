"""The shortest way through a layer where no gradient is wanted: one token at a time, the host's time is what counts.

It is for one low-rank adapter whose factors are tensors of its own, over a base layer that is nothing but a product.
What can change between two calls is asked for each time (hooks, tensors, mode); what follows from the state is held for
its version. Tensors are read from their modules at every call; only views of them are kept, and recognised by their
source and its memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_calls

from inlay.core.affine import LowRank
from inlay.core.call import open_calls
from inlay.core.dtype import product_dtype
from inlay.kernels.switch import fast_paths

if TYPE_CHECKING:
    from inlay.core.entry import Entry
    from inlay.core.layer import AdaptedLayer

__all__ = ["Ready", "ready_for"]

_linear = torch.nn.functional.linear


class Ready:
    """A layer and no adapter or one, resolved for one version of the state.

    Args:
        layer: the layer.
        entry: the adapter's entry, None where none runs (or what does is merged).
        homes: the modules that hold, by adapter name, those that its A, (r, in), and B, (out, r), are the weights of.
        scale: of the update.
    """

    __slots__ = (
        "base",
        "channels",
        "compute",
        "down",
        "layer",
        "modules",
        "name",
        "numbers",
        "options",
        "out",
        "plain",
        "scale",
        "source",
        "up",
        "views",
    )

    def __init__(self, layer: AdaptedLayer, entry: Entry | None = None, homes: Any = (), scale: float = 1.0) -> None:
        self.modules: Any = layer._modules
        self.base: Any = self.modules["base_layer"]
        self.layer = layer.__dict__
        self.plain = layer.kind.plain_tensors
        self.name = "" if entry is None else entry.name
        self.down: Any = homes[0]._modules if homes else None
        self.up: Any = homes[1]._modules if homes else None
        self.scale = scale
        self.channels, self.out = layer.site.channels, layer.site.out
        self.compute = layer.compute
        self.options = None if entry is None else entry.options
        self.numbers = None if entry is None else dict(entry.options)
        self.source: tuple[Any, ...] = (None,) * 5  # what ``views`` was made from
        self.views: Any = None

    def run(self, x: Tensor) -> Tensor | None:
        """Return the layer's output without gradient; None where the ordinary way has to be taken."""
        if open_calls.calls:
            return None
        found = self.product(x)
        if found is None:
            return None
        weight, bias = found
        if self.down is None:
            return _linear(x, weight, bias)
        factors = self.factors(x)
        if factors is None:
            return None
        down, up = factors
        axes = x.dim()
        if axes == 3 and x.shape[0] == 1:  # one token: to bring it into two axes and back costs as much as the update
            return _linear(x, weight, bias).baddbmm_(_linear(x, down), up.unsqueeze(0), alpha=self.scale)
        if axes == 2:
            return _linear(x, weight, bias).addmm_(_linear(x, down), up, alpha=self.scale)
        rows = x.reshape(-1, self.channels)
        y = _linear(rows, weight, bias)
        y.addmm_(_linear(rows, down), up, alpha=self.scale)
        return y.view(*x.shape[:-1], self.out)

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Return weight and bias if the base layer is nothing but their product with ``x``, and nobody looks on."""
        base, layer = self.base, self.layer
        own = base.__dict__
        found = self.plain(base)
        if (
            found is None
            or self.modules["base_layer"] is not base
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or layer["_forward_hooks"]
            or layer["_forward_pre_hooks"]
            or "forward" in own
            or "forward" in layer
            or module_calls._global_forward_hooks
            or module_calls._global_forward_pre_hooks
            or not fast_paths.on
            or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
            or torch._C._is_any_autocast_enabled()
            or torch._C._get_tracing_state()
        ):
            return None
        weight = found[0]
        cls = type(weight)
        if type(x) is not Tensor or (cls is not nn.Parameter and cls is not Tensor):
            return None
        return found if x.dtype is weight.dtype else None

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return A (r, in) and the transposed B (r, out) in the dtype of ``x``; None if they are not plain now."""
        if x.layout is not torch.strided or x.is_nested:
            return None
        A = self.down[self.name]._parameters.get("weight")
        B = self.up[self.name]._parameters.get("weight")
        held, dtype = self.source, x.dtype
        if (
            A is not held[0]
            or B is not held[1]
            or dtype is not held[2]
            or A.data_ptr() != held[3]
            or B.data_ptr() != held[4]
        ) and not self._refresh(A, B, x):
            return None
        if self.options != self.numbers:
            return None
        down, up = self.views
        if down.dtype is not dtype:
            down, up = down.to(dtype), up.to(dtype)  # anew each time, since nothing tells of writes through ``.data``
        return down, up

    def _refresh(self, A: Any, B: Any, x: Tensor) -> bool:
        """Make views of other tensors; False where they are not plain, or products are not to run in x's dtype."""
        if {type(A), type(B)} - {nn.Parameter, Tensor} or product_dtype(x, A.dtype, self.compute) != x.dtype:
            return False
        self.views = (A.detach(), B.detach().t())
        self.source = (A, B, x.dtype, A.data_ptr(), B.data_ptr())
        return True


def ready_for(layer: AdaptedLayer, chain: tuple[Entry, ...]) -> Ready | None:
    """Return the short way for a chain, or None if it has none."""
    if layer.kind.plain_tensors(layer._modules["base_layer"]) is None or (layer.merged and not layer.enabled):
        return None
    if not chain:
        return Ready(layer)
    if len(chain) != 1 or layer.training or layer.why_not_fused(chain) is not None:
        return None
    entry = chain[0]
    p = layer.params(entry)
    delta = entry.method.update(entry.site, p)
    held = {role: (containers, leaf) for role, containers, leaf in entry.places}
    if not isinstance(delta, LowRank) or delta.A is not p.get("A") or delta.B is not p.get("B"):
        return None
    if delta.bias is not None or not isinstance(delta.scale, (int, float)) or not {"A", "B"} <= held.keys():
        return None
    if any(isinstance(number, Tensor) for number in entry.options.values()):
        return None
    home: Any = entry.home if entry.home is not None else layer
    homes = []
    for role in ("A", "B"):
        containers, leaf = held[role]
        holder = home
        for part in containers:
            holder = holder._modules[part]
        module = holder._modules.get(entry.name)
        tensor = p.get(role)
        if leaf != "weight" or module is None or module._parameters.get("weight") is not tensor:
            return None
        homes.append(holder)
    return Ready(layer, entry, homes, float(delta.scale))
