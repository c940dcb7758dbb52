"""Adding low-rank updates to a weight in its own memory, rounding each number once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from inlay.core import storage
from inlay.core.affine import LowRank
from inlay.core.dtype import merge_dtype

if TYPE_CHECKING:
    from inlay.core.entry import Entry
    from inlay.core.layer import AdaptedLayer

__all__ = ["InPlace", "add_low_rank", "low_rank_updates", "matrix_in_place"]

Factors: TypeAlias = Sequence[tuple[Tensor, Tensor, float]]  # (B, A, scale) of each update
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Rows of a half-precision weight pass through a buffer of this many bytes: on a CPU it stays in the second-level cache.
_BUFFER = {"cpu": 512 * 1024}
_BUFFER_ELSEWHERE = 16 * 1024 * 1024


def low_rank_updates(layer: AdaptedLayer, chain: Sequence[Entry]) -> list[LowRank] | None:
    """Return the updates of a chain that only adds low-rank ones to the weight, with whole factors; None for others."""
    from inlay.core.layer import AdaptedLayer

    if type(layer).fold is not AdaptedLayer.fold or type(layer).merged_tensors is not AdaptedLayer.merged_tensors:
        return None
    found = []
    for entry in chain:
        if not entry.method.additive:
            return None
        delta = entry.method.update(entry.site, layer.params(entry, whole=True))
        if not isinstance(delta, LowRank) or delta.groups > 1 or delta.bias is not None:
            return None
        found.append(delta)
    return found


def matrix_in_place(layer: AdaptedLayer) -> Tensor | None:
    """Return the weight as (*experts, out, fan_in) in the layer's own memory, or None where it has no such view.

    It has none where a storage holds the weight in another form, processes share it, or the kind reads it changed.
    """
    leaf = layer.leaf_layer
    stored = getattr(leaf, layer.kind.weight_name)
    if storage.storage_of(leaf) is not storage.PLAIN or type(stored) not in (Tensor, nn.Parameter):
        return None
    if stored.dtype not in _FLOATS or stored.is_meta or stored.is_inference():
        return None
    matrix = layer.present_affine().weight.detach()
    same = matrix.data_ptr() == stored.data_ptr() and matrix.numel() == stored.numel() and matrix.dtype == stored.dtype
    return matrix if same and matrix.dim() in (2, 3) and 1 in matrix.stride()[-2:] else None


@torch.no_grad()
def add_low_rank(weight: Tensor, updates: Sequence[LowRank], out: Tensor, start: int = 0) -> None:
    """Write ``weight`` plus the updates into ``out``, which may be ``weight`` itself.

    Sums are made in float32 (float64 where a weight has it) and rounded once, to the dtype of ``out``. Beside the two,
    memory for some rows is needed, and for float32 copies of factors that have another dtype.

    Args:
        weight, out: (*experts, out, fan_in), with at most one axis of experts.
        updates: their factors have the same axes.
        start: steps to leave out because they were done; each raises the version of ``out`` by one.
    """
    compute = torch.promote_types(merge_dtype(weight.dtype), merge_dtype(out.dtype))
    steps = _whole if weight.dtype == out.dtype == compute else _by_rows
    for bank in [()] if weight.dim() == 2 else [(expert,) for expert in range(weight.shape[0])]:
        source, result = weight[bank], out[bank]
        factors = [(delta.B[bank], delta.A[bank], float(delta.scale)) for delta in updates]
        if result.stride(-1) != 1 and result.stride(0) == 1:  # rows of the memory are columns of the matrix
            source, result = source.t(), result.t()
            factors = [(A.t(), B.t(), scale) for B, A, scale in factors]
        start -= steps(source, factors, result, compute, max(0, start))


def _whole(source: Tensor, factors: Factors, result: Tensor, compute: torch.dtype, start: int) -> int:
    """Add in the dtype of the memory; return the number of steps, those left out included."""
    for step, (B, A, scale) in enumerate(factors):
        if step >= start:
            torch.addmm(source if step == 0 else result, B.to(compute), A.to(compute), alpha=scale, out=result)
    return len(factors)


def _by_rows(source: Tensor, factors: Factors, result: Tensor, compute: torch.dtype, start: int) -> int:
    """Add in a wider dtype, some rows at a time; return the number of steps, those left out included."""
    columns = max(1, result.shape[1])
    rows = max(1, _BUFFER.get(result.device.type, _BUFFER_ELSEWHERE) // (compute.itemsize * columns))
    buffer = torch.empty(min(rows, result.shape[0]), result.shape[1], dtype=compute, device=result.device)
    sources, results = source.split(rows), result.split(rows)
    parts = [(B.split(rows), A.to(compute), scale) for B, A, scale in factors]
    for step in range(start, len(results)):
        sums = buffer[: results[step].shape[0]]
        sums.copy_(sources[step])
        for B, A, scale in parts:
            sums.addmm_(B[step].to(compute), A, alpha=scale)
        results[step].copy_(sums)
    return len(results)


class InPlace:
    """One layer's update on its way into the memory of the weight.

    Args:
        matrix: what :func:`matrix_in_place` returns.
        updates: what is added.
    """

    def __init__(self, matrix: Tensor, updates: Sequence[LowRank]) -> None:
        self._matrix = matrix
        self._updates = updates
        self._before = matrix._version

    def write(self) -> None:
        """Add the update; what an interrupted call has done already is not done again."""
        add_low_rank(self._matrix, self._updates, self._matrix, self._matrix._version - self._before)
