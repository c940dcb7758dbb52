"""The products of a low-rank update, and what each gives back: the pieces of ``lowrank`` and ``lowrank_linear``.

Shapes: x (*, in), A (r, in), B (out, r), t = drop(x) A^T (*, r), W (out, in), y (*, out). Gradients are called after
what they are of: dz is that of z = x W^T + sum_i s_i t_i B_i^T. All but x, t and y have two axes, (rows, n): with
more, torch's choice of kernel depends on who wants a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from inlay.errors import UnsupportedError

__all__ = [
    "add_updates",
    "down_gradients",
    "multiplied",
    "rows_of",
    "shrunk",
    "side_by_side",
    "stacked",
    "up_gradients",
]

linear = torch.nn.functional.linear


def rows_of(tensor: Tensor) -> Tensor:
    """Return (*, n) as (rows, n)."""
    return tensor.reshape(-1, tensor.shape[-1])


def stacked(factors: Sequence[Tensor], dtype: torch.dtype, dim: int = 0) -> Tensor:
    """Return factors as one, in a dtype."""
    whole = factors[0] if len(factors) == 1 else torch.cat([f.to(dtype) for f in factors], dim)
    return whole.to(dtype)


def side_by_side(factors: Sequence[Tensor], scales: Sequence[float], t: Tensor) -> tuple[Tensor, float]:
    """Return the factors B of one t as one, in its dtype, and the scale that is left for the product."""
    if len(factors) == 1:
        return factors[0].to(t.dtype), scales[0]
    if len(set(scales)) == 1:
        return stacked(factors, t.dtype, 1), scales[0]
    return torch.cat([B.to(t.dtype) * s for B, s in zip(factors, scales, strict=True)], 1), 1.0


def _split(whole: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return (whole,) if len(sizes) == 1 else whole.split(sizes)


def _dropped(x: Tensor, dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    x = x.to(dtype)
    return x if bits is None else x * bits


def shrunk(x: Tensor, factors: Sequence[Tensor], dtype: torch.dtype, bits: Tensor | None) -> Tensor:
    """Return t (*, sum of ranks), made in ``dtype``; ``bits`` are 1 where an element of ``x`` is kept."""
    t = linear(rows_of(_dropped(x, dtype, bits)), stacked(factors, dtype))
    return t.view(*x.shape[:-1], t.shape[-1])


def down_gradients(
    dt: Tensor, x: Tensor | None, factors: Sequence[Tensor], bits: Tensor | None, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the factors A that are wanted; ``dt`` is that of t, (rows, sum of ranks)."""
    if x is None or not any(wanted):
        return [None] * len(factors)
    parts = _split(dt.mT @ rows_of(_dropped(x, dt.dtype, bits)), [A.shape[0] for A in factors])
    return [part.to(A.dtype) if want else None for part, A, want in zip(parts, factors, wanted, strict=True)]


def add_updates(
    x: Tensor | None,
    weight: Tensor | None,
    given: Tensor | None,
    own: Tensor | None,
    gain: Tensor | None,
    bias: Tensor | None,
    narrow: Sequence[Tensor],
    ups: Sequence[tuple[Tensor, float]],
) -> tuple[Tensor, Tensor]:
    """Return the output, and what ``gain`` multiplied (the same where there is none); see ``lowrank.expand``."""
    if given is None:
        assert x is not None
        assert weight is not None
        y, shape = linear(rows_of(x), weight, own), (*x.shape[:-1], weight.shape[0])
    else:
        y, shape = rows_of(given), given.shape
    fresh = given is None
    for t, (B, scale) in zip(narrow, ups, strict=True):
        if t.dtype != y.dtype:  # products of a higher precision are rounded once, with the sum
            y = torch.addmm(y.to(t.dtype), rows_of(t), B.mT, alpha=scale).to(y.dtype)
        elif fresh:
            y.addmm_(rows_of(t), B.mT, alpha=scale)
        else:
            y = torch.addmm(y, rows_of(t), B.mT, alpha=scale)
        fresh = True
    z = y
    if gain is not None:
        y = (z * gain).to(z.dtype)
        if bias is not None:
            y += bias.to(y.dtype)
    # not a view, since torch lets nobody write into one that a custom function returns (``nn.ReLU(inplace=True)``)
    return y if y.shape == shape else torch.ops.aten._unsafe_view.default(y, shape), z


def multiplied(
    dy: Tensor,
    gain: Tensor | None,
    before: Tensor | None,
    wanted: tuple[bool, bool, bool],
    dtypes: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Go back through what :func:`add_updates` does last.

    Args:
        dy: gradient of the output, (*, out).
        gain, before: the gain, and what it multiplied.
        wanted: whether the layer's own bias, the gain and the bias behind it want gradients.
        dtypes: of the two biases.

    Returns:
        dz (rows, out), and those three gradients.
    """
    if gain is not None and torch.is_grad_enabled():
        raise UnsupportedError(
            "a layer whose rows are scaled (DoRA) was asked for gradients of gradients, and its fast path does not "
            "keep what those need; run the forward under inlay.without_fast_paths()"
        )
    rows = rows_of(dy)
    if 0 in rows.stride():  # the gradient of a sum: each product would make its own copy of what is one number
        rows = rows.contiguous()
    dz = rows if gain is None else (rows * gain).to(rows.dtype)
    d_own, d_bias = (rows.sum(0).to(dtype) if want else None for want, dtype in zip(wanted[::2], dtypes, strict=True))
    d_gain = None
    if wanted[1]:
        assert gain is not None
        assert before is not None
        wide = torch.promote_types(gain.dtype, torch.float32)
        d_gain = torch.sum(rows * before, 0, dtype=wide).to(gain.dtype)
    return dz, (d_own, d_gain, d_bias)


def up_gradients(
    dz: Tensor,
    t: Tensor,
    factors: Sequence[Tensor],
    scales: Sequence[float],
    narrow: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Return the gradient of one t, (rows, sum of ranks), if ``narrow``, and those of its factors B that are wanted."""
    wide = dz.to(t.dtype)
    dt = None
    if narrow:
        B, scale = side_by_side(factors, scales, t)
        dt = wide @ B if scale == 1.0 else (wide @ B) * scale
    found: list[Tensor | None] = [None] * len(factors)
    if any(wanted):
        dB = rows_of(t).mT @ wide  # (r, out): a narrow result is made much faster lying than standing
        parts = _split(dB, [B.shape[1] for B in factors])
        for i, (part, scale) in enumerate(zip(parts, scales, strict=True)):
            if wanted[i]:
                found[i] = (part if scale == 1.0 else part * scale).mT.to(factors[i].dtype)
    return dt, found
