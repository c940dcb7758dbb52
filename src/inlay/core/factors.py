"""Where the factors of a low-rank update hang, so that they are read again without asking the method.

Of 32 adapters on a layer, asking costs a fifth of the base product. What is held is places, never a tensor, in whose
stead a transform may put another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from inlay.core.affine import LowRank

if TYPE_CHECKING:
    from inlay.core.entry import Entry
    from inlay.core.method import P

__all__ = ["FactorPath", "factor_paths", "hanging"]

# (modules on the way down from the entry's home, name of the parameter in the last of them)
FactorPath = tuple[tuple[str, ...], str]


def factor_paths(entry: Entry, p: P, delta: LowRank) -> tuple[FactorPath, FactorPath, FactorPath | None] | None:
    """Return where A, B and the bias of an update hang; None where one of them is no tensor of the adapter's own here.

    Args:
        entry: the adapter's.
        p: its tensors.
        delta: the update that the method made of them.
    """
    own = {id(getattr(p, role)): (containers, leaf) for role, containers, leaf in entry.places}
    found: list[Any] = []
    for tensor in (delta.A, delta.B, delta.bias):
        if tensor is None:
            found.append(None)
        elif id(tensor) not in own:
            return None
        else:
            containers, leaf = own[id(tensor)]
            *below, name = (entry.name, *leaf.split(".")) if leaf else (entry.name,)
            found.append(((*containers, *below), name))
    return found[0], found[1], found[2]


def hanging(home: nn.Module, path: FactorPath) -> Tensor | None:
    """Return the parameter at a path, or None if there is none; ``core.entry.find_tensor``, but quick."""
    holder: Any = home
    for part in path[0]:
        holder = holder._modules[part]
    found: Tensor | None = holder._parameters.get(path[1])
    return found
