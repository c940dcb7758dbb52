"""Writing values into a model's tensors: everything is made ready before the first one is touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from inlay.checkpoint.target import Target
from inlay.checkpoint.tree import Tree
from inlay.parallel.tensors import gather, is_distributed, local_share, rewrap, scatter

__all__ = ["Pairs", "copies_alone", "copy_all", "staged", "write", "write_staged"]

# Tensors of the model with their values, where copying is all there is to do.
Pairs = list[tuple[Tensor, Tensor]]

# Bytes that are copied between two releases of what they were read into.
STRETCH = 2**22

_PLAIN = (Tensor, nn.Parameter)


def write(tree: Tree, values: Mapping[Target, Tensor], release: Callable[[], object] | None = None) -> None:
    """Write values of the targets' shapes. Where both are plain tensors, one copy is all that is made.

    Args:
        release: called now and then, to let go of memory that the values were read into; they must stay readable.
    """
    ready: list[tuple[Target, Tensor]] = []
    direct: Pairs = []
    passed = 0
    for target, value in values.items():
        held = target.tensor
        if target.part != "embedding" and copies_alone(held, value):
            direct.append((held, value))
            continue
        ready.append((target, staged(target, value)))
        passed += value.nbytes
        if release is not None and passed > STRETCH:
            release()
            passed = 0
    for target, value in ready:
        write_staged(tree, target, value)
    copy_all(direct, release)


def copy_all(pairs: Pairs, release: Callable[[], object] | None = None) -> None:
    """Copy values into tensors of their shapes; see :func:`write`."""
    for stretch in _stretches(pairs):
        with torch.no_grad():
            torch._foreach_copy_([held for held, _ in stretch], [value for _, value in stretch])
        if release is not None:
            release()


def copies_alone(held: Tensor, value: Tensor) -> bool:
    """Whether a copy into a tensor is all there is to do, and cannot fail."""
    plain = type(held) in _PLAIN and type(value) in _PLAIN and not held.is_meta and not value.is_meta
    return plain and held.shape == value.shape


def _stretches(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[Pairs]:
    stretches: list[Pairs] = []
    room = 0
    for held, value in pairs:
        if room <= 0:
            stretches.append([])
            room = STRETCH
        stretches[-1].append((held, value))
        room -= value.nbytes
    return stretches


def staged(target: Target, value: Tensor) -> Tensor:
    """Return a value ready to be written, so that writing itself cannot fail."""
    held = target.tensor
    value = gather(value)
    if target.slot is not None and target.room is not None:
        value = target.slot.resized(value, target.room)
    if not held.is_meta:
        return scatter(value, held)
    device = value.device if target.device is None or target.device.type == "meta" else target.device
    share = local_share(value, held.device_mesh, held.placements) if is_distributed(held) else value  # type: ignore[attr-defined]
    # A copy of its own: the given tensor is the caller's, or part of a file that is mapped into memory.
    own = torch.empty_like(share, device=device, dtype=held.dtype).copy_(share)
    return rewrap(own, held) if is_distributed(held) else own


@torch.no_grad()
def write_staged(tree: Tree, target: Target, value: Tensor) -> None:
    """Write a value that :func:`staged` returned."""
    held = target.tensor
    if held.is_meta:
        table = target.table
        parameter = isinstance(held, nn.Parameter)
        table[target.attribute] = nn.Parameter(value, requires_grad=held.requires_grad) if parameter else value
        return
    if target.part == "embedding":
        _remember(tree, held, value)
    held.copy_(value)


def _remember(tree: Tree, held: Tensor, value: Tensor) -> None:
    """Keep a base tensor that a load changes, so that unloading gives it back."""
    name = tree.owner_name(held)
    if name is not None and name not in tree.state.base_values and not torch.equal(held, value):
        tree.state.base_values[name] = held.detach().clone()
