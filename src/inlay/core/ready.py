"""The shortest way through a layer where no gradient is wanted: one token at a time, the host's time is what counts.

It is for one low-rank adapter whose factors are tensors of its own, or none, over a base layer that is nothing but a
product. What can change between two calls is asked for each time (hooks, tensors, mode); what follows from the state is
held for its version. Tensors are read from their modules at every call; only views of them are kept, and recognised by
their source and its memory.

Between two calls of a layer the weights of all others went through the caches, so what counts is how many objects a
call looks at, more than what it does with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as module_calls
from torch.utils.hooks import RemovableHandle

from inlay.core.affine import LowRank
from inlay.core.dtype import product_dtype
from inlay.core.factors import factor_paths
from inlay.kernels.switch import fast_paths

if TYPE_CHECKING:
    from inlay.core.entry import Entry
    from inlay.core.layer import AdaptedLayer

__all__ = ["NotReady", "Ready", "ReadyUpdate", "Views", "ready_for"]

_PLAIN = (Tensor, nn.Parameter)
# names of this module, since looking them up in torch takes as long as calling them
_linear, _mm, _addmm = torch.nn.functional.linear, torch.mm, torch.addmm
_autocast = torch._C._is_any_autocast_enabled


class NotReady:
    """A layer that has no short way in one version of the state."""

    __slots__ = ("layer", "state", "training", "version")

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer = layer.__dict__
        self.state = layer.state
        self.version = layer.state.version
        self.training = layer.training

    def run(self, x: Any) -> Tensor | None:
        """Return the layer's output without gradient; None where the ordinary way has to be taken."""
        self.check_mode()
        return None

    def check_mode(self) -> bool:
        """Whether the layer's mode is still the same; if not, the next call finds its way anew."""
        if self.layer["training"] is self.training:
            return True
        self.version = -1
        return False


class Ready(NotReady):
    """A layer over which no adapter runs (or what does is merged), resolved for one version of the state.

    It does what the base layer's own forward does, so nothing is asked of the input or of the modes of torch.
    """

    __slots__ = ("base", "forward", "handles", "leaf", "modules", "plain", "transposed")

    def __init__(self, layer: AdaptedLayer) -> None:
        super().__init__(layer)
        modules: Any = layer._modules
        self.modules = modules
        self.leaf: Any = modules["base_layer"]
        self.base = self.leaf.__dict__
        self.forward: Any = type(self.leaf).forward
        self.plain = layer.kind.plain_tensors
        self.transposed = layer.site.transposed
        self.handles = -1  # how many handles of hooks had ever been made when none were found

    def run(self, x: Any) -> Tensor | None:
        base = self.base
        if (
            fast_paths.detours
            or (RemovableHandle.next_id != self.handles and self.hooked())
            or "forward" in base
            or "forward" in self.layer
            or self.modules["base_layer"] is not self.leaf
            or type(self.leaf).forward is not self.forward
        ):
            return None
        tensors = base["_parameters"]
        weight = tensors.get("weight")
        if weight is None:
            return None
        return _linear(x, weight.t() if self.transposed else weight, tensors["bias"])

    def hooked(self) -> bool:
        """Whether there are hooks on the call of the layer or of its base. Every hook that comes has a new handle."""
        handles = RemovableHandle.next_id
        for own in (self.layer, self.base):
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return True
        if module_calls._global_forward_hooks or module_calls._global_forward_pre_hooks:
            return True
        self.handles = handles
        return False


class Views(NamedTuple):
    """Plain tensors of a layer with an adapter, where they lie, and views of them without gradient.

    Attributes:
        weight, bias: of the base layer, as they are stored.
        A, B: (r, in) and (out, r).
        dtype: of the input.
        at_weight, at_A, at_B: addresses.
        wide: (in, out).
        down, up: (in, r) and (r, out).
        cast: whether these have to be brought to the dtype of the input, anew each time, since nothing tells of writes
            through ``.data``.
    """

    weight: Any
    bias: Any
    A: Any
    B: Any
    dtype: Any
    at_weight: int
    at_A: int
    at_B: int
    wide: Tensor
    down: Tensor
    up: Tensor
    cast: bool


class ReadyUpdate(Ready):
    """A layer with one adapter, resolved for one version of the state.

    Products are of two axes and of transposed views that stand ready: ``linear`` makes such views anew, which costs as
    much as the smaller products.

    Args:
        layer: the layer.
        entry: the adapter's entry.
        homes: the modules that hold, by adapter name, those that its A, (r, in), and B, (out, r), are the weights of.
        scale: of the update.
    """

    __slots__ = ("compute", "down", "held", "name", "numbers", "options", "out", "scale", "up")

    def __init__(self, layer: AdaptedLayer, entry: Entry, homes: Any, scale: float) -> None:
        super().__init__(layer)
        self.name = entry.name
        self.down: Any = homes[0]._modules
        self.up: Any = homes[1]._modules
        self.scale = scale
        self.out = layer.site.out
        self.compute = layer.compute
        self.options = entry.options
        self.numbers = dict(entry.options)
        self.held: Any = (None,) * len(Views._fields)

    def run(self, x: Any) -> Tensor | None:
        if fast_paths.detours:
            return None
        views = self.views(x)
        if views is None:
            return None
        _, bias, _, _, dtype, _, _, _, wide, down, up, cast = views
        axes, width = x.dim(), x.size(-1)
        if type(width) is not int:  # torch.jit traces
            return None
        if axes == 2:
            rows = x
        else:
            try:
                rows = x.view(-1, width)
            except RuntimeError:  # its rows do not follow one another
                rows = x.reshape(-1, width)
        if cast:
            down, up = down.to(dtype), up.to(dtype)
        y = _mm(rows, wide) if bias is None else _addmm(bias, rows, wide)
        y.addmm_(_mm(rows, down), up, alpha=self.scale)
        if axes == 2:
            return y
        return y.view(x.size(0), x.size(1), self.out) if axes == 3 else y.view(*x.shape[:-1], self.out)

    def views(self, x: Any) -> Views | None:
        """Return what to multiply rows by; None where the base layer is more than its product, somebody looks on, or
        the input, at least (1, in), or a tensor is not plain."""
        base, held = self.base, self.held
        if (
            (RemovableHandle.next_id != self.handles and self.hooked())
            or "forward" in base
            or "forward" in self.layer
            or self.modules["base_layer"] is not self.leaf
            or type(self.leaf).forward is not self.forward
            or type(x) is not Tensor
            or _autocast()
            or self.options != self.numbers
            or (self.layer["training"] and not self.check_mode())
        ):
            return None
        weight, bias, A, B, dtype, at_weight, at_A, at_B, _, _, _, _ = held
        tensors = base["_parameters"]
        if (
            tensors.get("weight") is not weight
            or tensors.get("bias") is not bias
            or self.down[self.name]._parameters.get("weight") is not A
            or self.up[self.name]._parameters.get("weight") is not B
            or x.dtype is not dtype
            or weight.data_ptr() != at_weight
            or A.data_ptr() != at_A
            or B.data_ptr() != at_B
        ):
            held = self._views(x)
        return held if x.dim() > 1 and x.layout is torch.strided and not x.is_nested else None

    def _views(self, x: Tensor) -> Views | None:
        """Look at other tensors, which a transform may have put there."""
        tensors = self.base["_parameters"]
        weight, bias = tensors.get("weight"), tensors.get("bias")
        A = self.down[self.name]._parameters.get("weight")
        B = self.up[self.name]._parameters.get("weight")
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            return None
        if any(type(tensor) not in _PLAIN for tensor in (weight, A, B)) or (
            bias is not None and type(bias) not in _PLAIN
        ):
            return None
        found = self.plain(self.leaf)
        if found is None or found[0].dtype != x.dtype or product_dtype(x, A.dtype, self.compute) != x.dtype:
            return None
        addresses = weight.data_ptr(), A.data_ptr(), B.data_ptr()
        wide, down, up = found[0].detach().t(), A.detach().t(), B.detach().t()
        cast = A.dtype != x.dtype or B.dtype != x.dtype
        self.held = held = Views(weight, bias, A, B, x.dtype, *addresses, wide, down, up, cast)
        return held


def ready_for(layer: AdaptedLayer, chain: tuple[Entry, ...]) -> NotReady:
    """Return the short way for a chain."""
    return _ready(layer, chain) or NotReady(layer)


def _ready(layer: AdaptedLayer, chain: tuple[Entry, ...]) -> Ready | None:
    if layer.kind.plain_tensors(layer._modules["base_layer"]) is None or (layer.merged and not layer.enabled):
        return None
    if not chain:
        return Ready(layer)
    if len(chain) != 1 or layer.training or layer.why_not_fused(chain) is not None:
        return None
    entry = chain[0]
    p = layer.params(entry)
    delta = entry.method.update(entry.site, p)
    if not isinstance(delta, LowRank) or not isinstance(delta.scale, (int, float)):
        return None
    if any(isinstance(number, Tensor) for number in entry.options.values()):
        return None
    paths = factor_paths(entry, p, delta)
    if paths is None or paths[2] is not None:
        return None
    homes = []
    for modules, leaf in paths[:2]:
        if leaf != "weight" or modules[-1] != entry.name:
            return None
        holder: Any = entry.home if entry.home is not None else layer
        for part in modules[:-1]:
            holder = holder._modules[part]
        if holder._modules[entry.name]._parameters.get(leaf) is None:  # it is computed
            return None
        homes.append(holder)
    return ReadyUpdate(layer, entry, homes, float(delta.scale))
