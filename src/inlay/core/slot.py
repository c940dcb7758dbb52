"""A slot is one tensor of an adapter, as data.

From slots alone follow memory names, shapes, creation on the meta device, placement under sharding, the
checkpoint map in both directions and the parameter count of an adapter that does not exist yet.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["After", "Constant", "Init", "KaimingUniform", "Normal", "Seeded", "Slot", "Uniform", "zeros"]

# Fills the given tensor in place, drawing from the generator only. Must be picklable: a module-level function
# or one of the small callables below, never a closure.
Init = Callable[[Tensor, torch.Generator], None]


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill with zeros."""
    tensor.zero_()


@dataclass(frozen=True)
class Constant:
    """Fill with one value."""

    value: float

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(self.value)


@dataclass(frozen=True)
class Normal:
    """Draw from a normal distribution."""

    std: float
    mean: float = 0.0

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(self.mean, self.std, generator=generator)


@dataclass(frozen=True)
class Uniform:
    """Draw uniformly from [-bound, bound], or from [low, bound]."""

    bound: float
    low: float | None = None

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-self.bound if self.low is None else self.low, self.bound, generator=generator)


@dataclass(frozen=True)
class KaimingUniform:
    """Draw uniformly from [-b, b] with b = gain * sqrt(3 / fan) (He et al. 2015, arXiv:1502.01852).

    ``fan`` is the number of elements per row unless given; ``a`` is the slope that the gain is computed for.
    """

    a: float = math.sqrt(5)
    fan: int | None = None

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        fan = self.fan if self.fan is not None else max(1, math.prod(tensor.shape[1:]))
        bound = math.sqrt(6.0 / ((1.0 + self.a**2) * fan))
        tensor.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Seeded:
    """Draw from a stream of its own, in float32, so that the values can be drawn again.

    Attributes:
        seed: what the stream starts from.
        init: draws.
        skip: shape of a tensor that is drawn before from the same stream, and thrown away.
    """

    seed: int
    init: Init
    skip: tuple[int, ...] | None = None

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        stream = torch.Generator().manual_seed(self.seed)
        if self.skip is not None:
            self.init(torch.empty(self.skip), stream)
        drawn = torch.empty(tensor.shape)
        self.init(drawn, stream)
        tensor.copy_(drawn)


@dataclass(frozen=True)
class After:
    """Draw a tensor that is thrown away, and then fill: what PEFT makes twice takes two draws from its stream.

    Attributes:
        thrown, shape: how the first one is drawn, and its shape.
        init: fills.
    """

    thrown: Init
    shape: tuple[int, ...]
    init: Init | None = None

    def __call__(self, tensor: Tensor, generator: torch.Generator) -> None:
        self.thrown(torch.empty(self.shape, dtype=tensor.dtype), generator)
        if self.init is not None:
            self.init(tensor, generator)


@dataclass(frozen=True)
class Slot:
    """One tensor of an adapter at one site.

    Attributes:
        key: name below the adapted layer, ``*`` standing for the adapter: ``lora_A.*.weight`` is a module per
            adapter with a parameter ``weight``; ``hada_w1_a.*`` is a parameter per adapter.
        shape: the logical (unsharded) shape.
        dims: one name per axis (``out``, ``in``, ``r``, ``k``, ...), which places the tensor under sharding.
        init: fills the tensor on the CPU, whatever device it will live on.
        disk: name in a checkpoint; by default the key without its ``*``.
        trainable: whether training may change it.
        saved: whether a checkpoint holds it.
        buffer: a buffer, not a parameter.
        dtype: fixed dtype; by default the dtype rule of ``core.dtype`` applies.
        leaf: ``"down"`` (layer input to rank) or ``"up"`` (rank to layer output) asks for a module that can be
            called on its own, like the ``lora_A`` and ``lora_B`` of PEFT; otherwise a bare holder is made.
        blocks: how many equal blocks the rank axis (``r``) consists of; a change of the rank changes each of them.
        discarded: what PEFT draws for the tensor first, and then replaces. It is drawn where initial values come from
            torch's global random stream, so that a seed gives PEFT's values.
    """

    key: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    init: Init = zeros
    disk: str | None = None
    trainable: bool = True
    saved: bool = True
    buffer: bool = False
    dtype: torch.dtype | None = None
    leaf: str | None = None
    blocks: int = 1
    discarded: Init | None = None

    def __post_init__(self) -> None:
        if self.key.split(".").count("*") != 1:
            raise ValueError(f"slot key {self.key!r} must contain '*' once, as a part of its own")

    @cached_property
    def place(self) -> tuple[tuple[str, ...], str]:
        """Containers above the adapter's name, and the leaf name below it (empty where there is none)."""
        above, _, below = self.key.partition("*")
        return tuple(part for part in above.split(".") if part), below.lstrip(".")

    @property
    def disk_name(self) -> str:
        """Name below the layer's path in a checkpoint."""
        return self.disk if self.disk is not None else self.key.replace(".*", "").replace("*.", "")

    def memory_name(self, adapter: str) -> str:
        """Name below the layer's path in ``state_dict()``."""
        return self.key.replace("*", adapter)

    @cached_property
    def sizes(self) -> tuple[Any, ...]:
        """The shape as arguments of ``torch.empty``, which takes a third less time for them than for a tuple."""
        return self.shape or ((),)

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape can be brought to the slot's by adding rank, and nothing else."""
        if tuple(shape) == self.shape:
            return True
        if "r" not in self.dims or len(shape) != len(self.shape):
            return False
        axis = self.dims.index("r")
        others = [i for i in range(len(shape)) if i != axis]
        return (
            shape[axis] < self.shape[axis]
            and shape[axis] % self.blocks == 0
            and all(shape[i] == self.shape[i] for i in others)
        )

    def resized(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Return a tensor of this slot with another rank: every block is cut, or padded with zeros, at its end.

        Args:
            tensor: of any rank.
            shape: what is wanted; it differs from the tensor's own in the axis ``r`` only.

        Returns:
            A tensor that shares memory with the given one where that is possible.
        """
        if tuple(tensor.shape) == tuple(shape):
            return tensor
        axis = self.dims.index("r")
        size = shape[axis] // self.blocks
        blocks = tensor.unflatten(axis, (self.blocks, -1))
        kept = blocks.narrow(axis + 1, 0, min(size, blocks.shape[axis + 1]))
        if kept.shape[axis + 1] < size:
            padded = tensor.new_zeros(shape).unflatten(axis, (self.blocks, -1))
            padded.narrow(axis + 1, 0, kept.shape[axis + 1]).copy_(kept)
            kept = padded
        return kept.flatten(axis, axis + 1)


class _Local(threading.local):
    def __init__(self) -> None:
        self.generator = torch.Generator()


_local = _Local()


def generator_for(seed: int, site: str, key: str) -> torch.Generator:
    """Return a CPU generator that depends on seed, site and slot alone.

    So initial values do not depend on the order of injection, on the device, or on how tensors are sharded. It is the
    running thread's one generator, which the next call seeds anew.
    """
    digest = hashlib.blake2b(f"{seed}\0{site}\0{key}".encode(), digest_size=8).digest()
    return _local.generator.manual_seed(int.from_bytes(digest, "little") & 0x7FFF_FFFF_FFFF_FFFF)
