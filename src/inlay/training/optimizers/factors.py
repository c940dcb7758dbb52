"""The two factors of a low-rank update, as the parameters of a model have them: by name, and as matrices."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.layer import AdaptedLayer
from inlay.core.sliced import own_method, own_site

__all__ = ["Name", "Packing", "damped_inverse", "scaling_of"]


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

    @property
    def values(self) -> str:
        """The name of the singular values between A and B, which KaSA has."""
        return ".".join(part for part in (self.layer, "lora_diag", self.adapter) if part)


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


@dataclass(frozen=True)
class Packing:
    """How many independent updates a pair of factors holds, where each has its part, and how A is applied.

    A grouped convolution, or a block-diagonal B, has one for each group of outputs; a block-diagonal A one for each
    group of inputs; a bank one for each expert.

    Attributes:
        experts: how many experts the rank axes hold: slowest in A, fastest in B.
        inputs: how many groups of inputs have a part of the rank to themselves.
        spread: the squared norm of A as it is applied, over that of A as it is stored (QA-LoRA repeats it).
        outputs: how many groups of outputs have a part of the rank to themselves.
    """

    experts: int = 1
    inputs: int = 1
    spread: float = 1.0
    outputs: int = 1

    @classmethod
    def at(cls, model: nn.Module, name: str) -> Packing:
        """Return the packing of the factors that a parameter belongs to, but for ``outputs``."""
        parsed = Name.parse(name)
        layer = None if parsed is None else _layer(model, parsed)
        if parsed is None or not isinstance(layer, AdaptedLayer):
            return cls()
        found = cls()
        for entry in layer.entries.get(parsed.adapter, ()):
            method, site = own_method(entry.method), own_site(entry.method, entry.site)
            slot = method.slots(site).get("B")
            spread = getattr(method, "spread", None)
            if slot is not None and spread is not None:
                found = cls(math.prod(site.experts), slot.blocks, spread(site))
        return found

    def of(self, A: Tensor, B: Tensor) -> Packing:
        """Return the whole packing of the factors A (r, in, *kernel) and B (out, r / outputs, *ones)."""
        return replace(self, outputs=A.shape[0] // B.shape[1])

    @property
    def count(self) -> int:
        """How many independent updates there are."""
        return self.experts * self.outputs * self.inputs

    def matrices_A(self, A: Tensor) -> Tensor:
        """Return A, or its gradient, as (updates, r, fan_in)."""
        return A.flatten(1).unflatten(0, (self.count, -1))

    def matrices_B(self, B: Tensor) -> Tensor:
        """Return B, or its gradient, as (updates, out, r)."""
        apart = B.flatten(1).unflatten(0, (self.outputs, -1)).unflatten(2, (self.inputs, -1, self.experts))
        return apart.permute(4, 0, 2, 1, 3).flatten(0, 2)

    def packed_B(self, matrices: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`matrices_B`."""
        apart = matrices.unflatten(0, (self.experts, self.outputs, self.inputs))
        return apart.permute(1, 3, 2, 4, 0).reshape(like.shape)

    def scaled_A(self, A: Tensor, values: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return A's matrices as they are applied, times the singular values ``values`` (r,) of its rows if it has any.

        Their products ``A A'`` are right; A itself is not repeated.
        """
        matrices = self.matrices_A(A).to(dtype) * self.spread**0.5
        return matrices if values is None else matrices * values.to(dtype).reshape(self.count, -1, 1)

    def scaled_B(self, B: Tensor, values: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return B's matrices with what stands between A's rows and them, as :meth:`scaled_A` does for A."""
        matrices = self.matrices_B(B).to(dtype) * self.spread**0.5
        return matrices if values is None else matrices * values.to(dtype).reshape(self.count, 1, -1)


def damped_inverse(gram: Tensor, damping: float) -> Tensor:
    """Return the pseudo-inverse of ``gram + damping * I``, for one matrix (r, r) or several."""
    identity = torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype)
    return torch.linalg.pinv(gram + damping * identity)
