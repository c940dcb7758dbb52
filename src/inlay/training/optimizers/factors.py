"""The two factors of a low-rank update, as the parameters of a model have them: by name, and as matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.layer import AdaptedLayer

__all__ = ["Name", "Packing", "damped_inverse", "experts_of", "scaling_of"]


@dataclass(frozen=True)
class Name:
    """The name of a parameter of a LoRA adapter, ``<layer>.<container>.<adapter>[.<leaf>]``.

    Attributes:
        layer: dotted path of the adapted layer.
        container: ``lora_A``, ``lora_B``, ``lora_embedding_A``, ``lora_magnitude_vector``, ...
        adapter: the adapter.
        leaf: what follows the adapter's name: ``weight``, ``bias`` or nothing.
    """

    layer: str
    container: str
    adapter: str
    leaf: str

    @classmethod
    def parse(cls, name: str) -> Name | None:
        """Return a name's parts, or None where it is not that of a LoRA adapter's parameter."""
        parts = name.split(".")
        for i in (len(parts) - 3, len(parts) - 2):
            if i >= 0 and parts[i].startswith("lora_"):
                return cls(".".join(parts[:i]), parts[i], parts[i + 1], ".".join(parts[i + 2 :]))
        return None

    @property
    def is_factor(self) -> bool:
        """Whether it is A or B of a layer that multiplies features; an embedding looks A up instead."""
        return self.container in ("lora_A", "lora_B") and self.leaf == "weight"

    def other(self, container: str) -> str:
        """Return the same name with another container."""
        return ".".join(part for part in (self.layer, container, self.adapter, self.leaf) if part)


def _layer(model: nn.Module, name: Name) -> Any:
    try:
        return model.get_submodule(name.layer)
    except AttributeError:  # a name from another model, or from a wrapper that was taken off
        return None


def scaling_of(model: nn.Module, name: str) -> float | None:
    """Return the scale of the update that a parameter belongs to, or None."""
    parsed = Name.parse(name)
    scales = None if parsed is None else getattr(_layer(model, parsed), "scaling", None)
    if parsed is None or scales is None or parsed.adapter not in scales:
        return None
    return float(scales[parsed.adapter])


def experts_of(model: nn.Module, name: str) -> int:
    """Return how many experts a parameter holds the factors of, 1 where it is no bank."""
    parsed = Name.parse(name)
    layer = None if parsed is None else _layer(model, parsed)
    if parsed is None or not isinstance(layer, AdaptedLayer):
        return 1
    return max((_product(entry.site.experts) for entry in layer.entries.get(parsed.adapter, ())), default=1)


def _product(sizes: tuple[int, ...]) -> int:
    return int(torch.Size(sizes).numel())


@dataclass(frozen=True)
class Packing:
    """How many independent updates a pair of factors holds, and where each has its part.

    A grouped convolution has one for each group of outputs, a bank one for each expert.
    """

    groups: int = 1
    experts: int = 1

    @classmethod
    def of(cls, A: Tensor, B: Tensor, experts: int = 1) -> Packing:
        """Return the packing of the factors A (r, in, *kernel) and B (out, r / groups, *ones)."""
        return cls(1, experts) if experts > 1 else cls(A.shape[0] // B.shape[1], 1)

    def matrices_A(self, A: Tensor) -> Tensor:
        """Return A, or its gradient, as (updates, r, fan_in), or (r, fan_in) where there is one update."""
        count = self.groups * self.experts
        flat = A.flatten(1)
        return flat if count == 1 else flat.unflatten(0, (count, -1))

    def matrices_B(self, B: Tensor) -> Tensor:
        """Return B, or its gradient, as (updates, out, r), or (out, r) where there is one update."""
        flat = B.flatten(1)
        if self.experts > 1:
            return flat.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        return flat if self.groups == 1 else flat.unflatten(0, (self.groups, -1))

    def packed_B(self, matrices: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`matrices_B`."""
        return (matrices.permute(1, 2, 0) if self.experts > 1 else matrices).reshape(like.shape)


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """Return the pseudo-inverse of ``gram + damping * I``, for one matrix (r, r) or several."""
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return torch.linalg.pinv(gram + damping * identity)
