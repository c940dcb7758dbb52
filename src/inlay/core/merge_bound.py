"""Whether a merged weight is finite: proved from bounds where they tell, seen number by number where not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from inlay.core.affine import LowRank

__all__ = ["is_finite", "known_finite", "note_finite", "proved_finite"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ROUNDING = 1.01  # what sums of a rank's products and these bounds themselves are off by at most
_known: Any = WeakIdKeyDictionary()  # tensor that was seen to be finite -> which values it had then


@torch.no_grad()
def proved_finite(weight: Tensor, updates: Sequence[LowRank]) -> bool:
    """Whether ``weight`` plus low-rank updates must be finite in the weight's dtype; False if bounds do not tell.

    A finite number stays finite when less than half a unit in the last place of the dtype's largest number is added to
    it. So small factors ask only whether the weight is finite, which one read of it tells; large ones ask for
    max|W| + s |B||A| below the largest number. No memory of the weight's size is used.
    """
    if weight.dtype not in _FLOATS:
        return False
    limit = torch.finfo(weight.dtype)
    negligible = limit.max * limit.eps / 8
    if sum(map(_roughly, updates)) < negligible or sum(map(_closely, updates)) < negligible:
        return is_finite(weight)
    return _largest(weight) + sum(map(_closely, updates)) < limit.max / 2


def is_finite(weight: Tensor) -> bool:
    """Whether every number is finite. Reads the tensor once (a second time if its sum overflows)."""
    if known_finite(weight):
        return True
    if math.isfinite(_sum(weight)) or math.isfinite(_largest(weight)):
        note_finite(weight)
        return True
    return False


def known_finite(weight: Tensor) -> bool:
    """Whether a tensor was seen to be finite and has not been written since."""
    held = _known.get(weight)
    return held is not None and held == (weight._version, weight.data_ptr())


def note_finite(weight: Tensor) -> None:
    """Remember that a tensor is finite as it is now; the next write to it ends that."""
    if not weight.is_inference():
        _known[weight] = (weight._version, weight.data_ptr())


def _sum(weight: Tensor) -> float:
    """Return some sum over all numbers, which is not finite if one of them is not."""
    if weight.dim() == 2 and weight.dtype in (torch.float32, torch.float64) and 1 in weight.stride():
        return float(torch.mv(weight.t(), weight.new_ones(weight.shape[0])).sum())  # a tenth faster than sum()
    return float(weight.sum())


def _largest(tensor: Tensor) -> float:
    """Return the largest magnitude; nan where there is one among the numbers."""
    if tensor.numel() == 0:
        return 0.0
    lowest, highest = torch.aminmax(tensor)
    return float(torch.maximum(-lowest, highest))


def _roughly(delta: LowRank) -> float:
    """Return a bound on the numbers of an update: the Frobenius norm of B by that of A."""
    return _norm(delta.B) * _norm(delta.A) * abs(float(delta.scale)) * _ROUNDING


def _norm(factor: Tensor) -> float:
    if factor.dtype in (torch.float32, torch.float64) and factor.is_contiguous():
        flat = factor.view(-1)
        return math.sqrt(float(torch.dot(flat, flat)))  # in a quarter of the time
    return float(torch.linalg.vector_norm(factor))


def _closely(delta: LowRank) -> float:
    """Return a closer bound, which takes longer: the largest row sum of |B| by the largest of |A|."""
    if delta.B.numel() == 0:
        return 0.0
    rows = float(torch.linalg.vector_norm(delta.B.float(), ord=1, dim=-1).amax())
    return rows * _largest(delta.A) * abs(float(delta.scale)) * _ROUNDING
