"""How the tensors of an adapter are spread, given how the base weight is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.errors import UnsupportedError
from inlay.parallel.hooks import hidden_reduction
from inlay.parallel.tensors import is_distributed

if TYPE_CHECKING:
    from inlay.core.affine import Site
    from inlay.core.kind import Kind
    from inlay.core.slot import Slot

__all__ = ["Layout", "is_alone", "layout_of", "spread"]

# axis of a base weight -> names that slots give to the same extent
_SAME_EXTENT = {"out": ("out",), "in": ("in", "all_in", "fan_in")}


@dataclass(frozen=True)
class Layout:
    """How the slots of one site are spread.

    Attributes:
        mesh: the base weight's device mesh.
        axes: for each dimension of the mesh, the axis of the base weight that it shards (``out`` or ``in``), or None
            where every process has the whole weight.
    """

    mesh: Any
    axes: tuple[str | None, ...]

    def placements(self, slot: Slot) -> list[Any]:
        """Return the placement of a slot on each dimension of the mesh."""
        from torch.distributed.tensor import Replicate, Shard

        found: list[Any] = []
        for axis in self.axes:
            names = _SAME_EXTENT[axis] if axis is not None else ()
            index = next((i for i, name in enumerate(slot.dims) if name in names), None)
            found.append(Replicate() if index is None else Shard(index))
        return found

    def distribute(self, tensor: Tensor, slot: Slot) -> Tensor:
        """Spread a slot's first values; those of the mesh's first process count, as everywhere in torch."""
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, self.mesh, self.placements(slot))

    def agree(self, tensor: Tensor) -> Tensor:
        """Return the mesh's first process's values of a tensor that every process holds whole."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        return distribute_tensor(tensor, self.mesh, [Replicate()] * self.mesh.ndim).to_local()


def is_alone(module: nn.Module, weight: object) -> bool:
    """Whether :func:`layout_of` is plainly None: the weight is a tensor of torch's own, and nothing hangs on calls."""
    own = module.__dict__
    plain = type(weight) is nn.Parameter or type(weight) is Tensor
    return plain and not own["_forward_pre_hooks"] and not own["_forward_hooks"] and "forward" not in own


def layout_of(module: nn.Module, kind: Kind, site: Site) -> Layout | None:
    """Return how slots at a layer are spread, None where its weight is in this process alone.

    Raises:
        UnsupportedError: the weight is spread in a way that the adapter's tensors cannot follow.
    """
    weight = getattr(module, kind.weight_name, None)
    reason = hidden_reduction(module)
    if reason is not None:
        raise UnsupportedError(f"{site.name!r} cannot be adapted: {reason}")
    if not isinstance(weight, Tensor) or not is_distributed(weight):
        return None
    from torch.distributed.tensor import Replicate, Shard

    dims = kind.stored_dims(site)
    axes: list[str | None] = []
    for placement in weight.placements:  # type: ignore[attr-defined]
        if type(placement) is Replicate:
            axes.append(None)
            continue
        axis = dims[placement.dim % len(dims)] if type(placement) is Shard else None
        if axis not in _SAME_EXTENT or (axis == "in" and site.groups > 1):
            raise UnsupportedError(
                f"the weight of {site.name!r} is spread over processes as {placement}, and an adapter's tensors can "
                "follow a weight that is sharded by output or by input features only"
            )
        axes.append(axis)
    return Layout(weight.device_mesh, tuple(axes))  # type: ignore[attr-defined]


@torch.no_grad()
def spread(tensor: Tensor, slot: Slot, layout: Layout | None) -> Tensor:
    """Return a slot's tensor as ``layout`` says; one process alone keeps it as it is."""
    return tensor if layout is None else layout.distribute(tensor, slot)
