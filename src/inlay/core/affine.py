"""The view that methods have of a layer: ``Affine`` (the map), ``Site`` (its frozen shape), ``Delta`` (an update).

Whatever a layer is, its weight is a matrix of shape (out, fan_in): a convolution is flattened, an embedding is a
linear layer on one-hot rows, a norm has fan_in 1. A bank of experts has leading axes: (experts, out, fan_in).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.slot import Init, Slot, zeros
from inlay.core.stored import matrix_of, stored_dims, stored_of, stored_shape
from inlay.errors import UnsupportedError

__all__ = ["Affine", "Columns", "Delta", "Dense", "LowRank", "Site"]


class Affine:
    """The affine map ``x -> x @ weight.T + bias``.

    Attributes:
        weight: (*experts, out, fan_in).
        bias: (out,) or None.
    """

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def to(self, dtype: torch.dtype) -> Affine:
        """Return the map in another dtype."""
        return Affine(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))

    def add(self, delta: Delta) -> Affine:
        """Return this map plus an update, in the wider dtype of the two."""
        bias = self.bias
        if delta.bias is not None:
            bias = delta.bias * delta.scale if bias is None else bias + delta.bias * delta.scale
        weight = self.weight
        if isinstance(delta, LowRank) and delta.plain_beside(weight):
            # one pass and one new tensor, where the sum with a dense update takes two of each
            return Affine(torch.addmm(weight, delta.B, delta.A, alpha=float(delta.scale)), bias)
        return Affine(weight + delta.dense(), bias)


@dataclass(frozen=True)
class Site:
    """The frozen shape of one adapted place. Methods see a site, never a layer class.

    Attributes:
        name: dotted path of the layer in the model.
        kind: name of the layer kind.
        out: output features or channels.
        channels: input features or channels that one output sees (for a grouped convolution: per group).
        kernel: spatial kernel shape, empty for anything but a convolution.
        groups: groups of a convolution.
        experts: leading axes of an expert bank.
        lookup: inputs are indices, not features (an embedding).
        pooled: the looked-up rows are summed or averaged, so that an output belongs to no single index.
        elementwise: the weight multiplies elementwise (a norm); it is presented with one channel.
        bias: whether the layer has a bias.
        transposed: the weight is stored as (in, out), or (in, out / groups, *kernel).
        parameter: the parameter's name where the site is a bare parameter; such a site knows ``rewrite`` only.
        patterns: the path that rank and alpha patterns are held against, where that is not ``name``.
        axes: the stored shape of a norm's weight.
        padding: the index whose row an embedding never trains.
    """

    name: str
    kind: str
    out: int
    channels: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    experts: tuple[int, ...] = ()
    lookup: bool = False
    pooled: bool = False
    elementwise: bool = False
    bias: bool = False
    transposed: bool = False
    parameter: str | None = None
    patterns: str | None = None
    axes: tuple[int, ...] = ()
    padding: int | None = None

    def below(self, prefix: str) -> Site:
        """Return the site as a larger model names it; patterns go on meaning what they meant."""
        return replace(self, name=prefix + self.name, patterns=self.patterns or self.name)

    def named(self, name: str) -> Site:
        """Return a site of the same form under another name."""
        own = self.__dict__.copy()
        own["name"] = name
        other = object.__new__(Site)
        object.__setattr__(other, "__dict__", own)  # half of what it takes to update a dict that is there
        return other

    @cached_property
    def form(self) -> tuple[Any, ...]:
        """All but the name, where patterns look at no other name."""
        return _FORM(self)

    @property
    def owner(self) -> str:
        """Dotted path of the module that holds the site's tensors."""
        return self.name if self.parameter is None else self.name.rpartition(".")[0]

    @property
    def fan_in(self) -> int:
        """Columns of the weight matrix."""
        return self.channels * math.prod(self.kernel)

    @property
    def plain(self) -> bool:
        """Whether features are mapped to features by one matrix, as in a linear layer."""
        return not (self.kernel or self.lookup or self.elementwise or self.experts)

    @property
    def all_channels(self) -> int:
        """Input channels over all groups."""
        return self.channels * self.groups

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in which the layer itself holds its weight."""
        return stored_shape(self)

    @property
    def stored_dims(self) -> tuple[str, ...]:
        """A name for each axis of ``stored_shape``: ``experts``, ``out``, ``in``, ``kernel``."""
        return stored_dims(self)

    def from_stored(self, tensor: Tensor) -> Tensor:
        """Turn a tensor of the stored shape into (*experts, out, fan_in)."""
        return matrix_of(self, tensor)

    def to_stored(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`from_stored`."""
        return stored_of(self, weight)

    def shape(self, dims: str, **sizes: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Resolve dims such as ``"r in *kernel"`` to a shape and one name per axis.

        Known: ``out``, ``in``, ``all_in``, ``fan_in``, ``*kernel``, ``*ones`` (a one per kernel axis),
        ``*experts``, integers, and whatever ``sizes`` names.
        """
        known = {"out": self.out, "in": self.channels, "all_in": self.all_channels, "fan_in": self.fan_in, **sizes}
        shape: list[int] = []
        names: list[str] = []
        for dim in dims.split():
            if dim.startswith("*"):
                extents = {"*kernel": self.kernel, "*ones": (1,) * len(self.kernel), "*experts": self.experts}[dim]
                shape.extend(extents)
                names.extend([dim[1:]] * len(extents))
            else:
                shape.append(int(dim) if dim.isdigit() else known[dim])
                names.append(dim)
        return tuple(shape), tuple(names)

    def slot(
        self, key: str, dims: str, init: Init = zeros, *, options: dict[str, Any] | None = None, **sizes: int
    ) -> Slot:
        """Return a slot whose shape is resolved at this site; ``options`` are further fields of the slot."""
        shape, names = self.shape(dims, **sizes)
        return Slot(key, shape, names, init, **(options or {}))

    def constant(
        self, key: str, dims: str, init: Init = zeros, *, saved: bool = False, dtype: Any = None, **sizes: int
    ) -> Slot:
        """Return a slot for a buffer that never trains."""
        return self.slot(
            key, dims, init, options={"buffer": True, "trainable": False, "saved": saved, "dtype": dtype}, **sizes
        )

    def along_output(self, vector: Tensor) -> Tensor:
        """Shape a vector (out,) so that it multiplies the layer's output by feature or channel."""
        return vector.view(-1, *([1] * len(self.kernel))) if self.kernel else vector

    def channels_last(self, y: Tensor) -> Tensor:
        """Move the channels of an output, or of an input of such a form, to the last axis."""
        return y.movedim(-1 - len(self.kernel), -1)

    def channels_back(self, y: Tensor) -> Tensor:
        """Undo :meth:`channels_last`."""
        return y.movedim(-1, -1 - len(self.kernel))

    def matrix(self, tensor: Tensor) -> Tensor:
        """Flatten everything behind the row axis: a kernel (out, in, kh, kw) becomes (out, in * kh * kw)."""
        rows = len(self.experts) + 1
        return tensor.flatten(rows) if tensor.dim() > rows + 1 else tensor


_FORM = attrgetter(*(field.name for field in fields(Site) if field.name != "name"))


class Delta:
    """An additive update of a layer, kept as an operator until someone needs it dense.

    Attributes:
        scale: a factor on weight and bias of the update.
        bias: (out,) or None, unscaled.
    """

    scale: float | Tensor = 1.0
    bias: Tensor | None = None

    def dense(self) -> Tensor:
        """Return the scaled update as a matrix (*experts, out, fan_in)."""
        raise NotImplementedError

    def scaled(self, factor: float | Tensor) -> Delta:
        """Multiply this update by a factor, in its ``scale``, and return it; its tensors stay as they are."""
        if not (isinstance(factor, (int, float)) and factor == 1.0):
            self.scale = self.scale * factor
        return self


class Dense(Delta):
    """An update given as a matrix."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.scale = 1.0

    def dense(self) -> Tensor:
        return self.weight * self.scale


class LowRank(Delta):
    """The update ``B @ A``.

    Args:
        B: (*experts, out, r).
        A: (*experts, r, fan_in).
        bias: (out,) or None.
        groups: more than 1 for a grouped convolution whose A reads all input channels while each group of outputs
            uses its own slice of the rank: B is then (out, r / groups). Such an update crosses groups, so the
            layer's own weight cannot hold it.
    """

    def __init__(self, B: Tensor, A: Tensor, bias: Tensor | None = None, groups: int = 1) -> None:
        self.B = B
        self.A = A
        self.bias = bias
        self.groups = groups
        self.scale = 1.0

    def plain_beside(self, weight: Tensor) -> bool:
        """Whether factors and ``weight`` are ordinary matrices of one dtype, and nothing crosses groups."""
        return (
            self.groups == 1
            and isinstance(self.scale, (int, float))
            and self.A.dtype == self.B.dtype == weight.dtype
            and all(t.dim() == 2 and type(t) in (Tensor, nn.Parameter) for t in (self.A, self.B, weight))
        )

    def dense(self) -> Tensor:
        if self.groups > 1:
            raise UnsupportedError(
                "a grouped convolution has no weights between its groups, and this low-rank update crosses them: "
                "it runs unmerged, but cannot be written into the weight"
            )
        A = self.A.to(self.B.dtype) if self.A.dtype != self.B.dtype else self.A
        return torch.matmul(self.B, A) * self.scale


class Columns(Delta):
    """An update of a few columns.

    Args:
        index: (n,) which columns, each once.
        values: (n, out) what is added to them.
        fan_in: columns of the whole weight.
    """

    def __init__(self, index: Tensor, values: Tensor, fan_in: int) -> None:
        self.index = index
        self.values = values
        self.fan_in = fan_in
        self.scale = 1.0

    def dense(self) -> Tensor:
        columns = self.values.mT * self.scale
        return columns.new_zeros(columns.shape[0], self.fan_in).index_copy(1, self.index, columns)
