"""Exact unmerging without a second copy of the weight: only what recomputation cannot restore is kept.

Taking the update off a merged weight again gives the original number or, for a few in a hundred, its neighbour. Two
bits a number say which, a list holds the rare others, and zlib makes little of both. The update is recomputed in
float64 from a snapshot of the factors: then a product that is summed in another order (another number of threads,
another alignment) still rounds to the same numbers. Each block of rows has a checksum.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.core.affine import LowRank, Site
from inlay.core.kind import Kind
from inlay.errors import StateError

__all__ = ["PackedKept", "Packing", "can_pack"]

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
_BLOCK = 64 * 1024  # numbers that are packed together; rows are not split
_ELSEWHERE = 3  # the code of a number that is neither what recomputation gives nor a neighbour of it


def can_pack(matrix: Tensor) -> bool:
    """Whether a weight can be packed: a matrix of rows in half precision or float32 on the CPU."""
    return matrix.dim() == 2 and matrix.dtype in _BITS and matrix.device.type == "cpu"


@dataclass(frozen=True)
class _Block:
    """What restores some rows.

    Attributes:
        codes: two bits a number, compressed; or the rows themselves where that is smaller.
        others: steps between the positions of numbers that no code reaches, and their differences from what
            recomputation gives, compressed; None where ``codes`` has the rows themselves.
        checksum: CRC-32 of the original rows.
    """

    codes: bytes
    others: bytes | None
    checksum: int

    @property
    def nbytes(self) -> int:
        return len(self.codes) + len(self.others or b"")


class Packing:
    """Writes an update into a weight block by block, and keeps what it takes to get each block back.

    Args:
        matrix: (out, fan_in) in the weight's own memory.
        updates: what is added; their factors are copied.
    """

    def __init__(self, matrix: Tensor, updates: Sequence[LowRank]) -> None:
        self._turned = matrix.stride(-1) != 1
        self._matrix: Tensor | None = matrix.t() if self._turned else matrix
        factors = [(delta.B.detach(), delta.A.detach(), float(delta.scale)) for delta in updates]
        if self._turned:
            factors = [(A.t(), B.t(), scale) for B, A, scale in factors]
        self._factors = [(B.clone(), A.clone(), scale) for B, A, scale in factors]
        self._rows = max(1, _BLOCK // max(1, self._matrix.shape[1]))
        self._blocks: list[_Block] = []
        self._before = matrix._version

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, the copies of the factors included."""
        factors = sum(t.numel() * t.element_size() for B, A, _ in self._factors for t in (B, A))
        return factors + sum(block.nbytes for block in self._blocks)

    @torch.no_grad()
    def write(self) -> None:
        """Add the update; what an interrupted call has done already is not done again."""
        matrix = self._matrix
        assert matrix is not None
        parts = matrix.split(self._rows)
        wide = _wide(self._factors)
        done = matrix._version - self._before
        del self._blocks[done:]
        for step in range(done, len(parts)):
            rows = slice(step * self._rows, (step + 1) * self._rows)
            merged = parts[step].float()
            merged = merged.clone() if merged.data_ptr() == parts[step].data_ptr() else merged
            for B, A, scale in self._factors:
                merged.addmm_(B[rows].float(), A.float(), alpha=scale)
            merged = merged.to(matrix.dtype)
            self._blocks.append(_packed(parts[step], _without(merged, wide, rows)))
            parts[step].copy_(merged)

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what an interrupted :meth:`write` has written."""
        matrix = self._matrix
        assert matrix is not None
        done = matrix._version - self._before
        wide = _wide(self._factors)
        for step, part in enumerate(matrix.split(self._rows)[:done]):
            part.copy_(self._original(step, part, wide))

    def seal(self) -> None:
        """Let go of the weight's memory; what was written stays."""
        self._matrix = None

    @torch.no_grad()
    def original(self, merged: Tensor) -> Tensor:
        """Return the original weight (out, fan_in) on the CPU, given the merged one.

        Raises:
            StateError: it is not the weight that was written.
        """
        merged = merged.detach().to("cpu")
        result = torch.empty_like(merged)
        source, target = (t.t() if self._turned else t for t in (merged, result))
        wide = _wide(self._factors)
        for step, (part, out) in enumerate(zip(source.split(self._rows), target.split(self._rows), strict=True)):
            out.copy_(self._original(step, part, wide))
        return result

    def _original(self, step: int, merged: Tensor, wide: list[tuple[Tensor, Tensor, float]]) -> Tensor:
        block = self._blocks[step]
        rows = slice(step * self._rows, (step + 1) * self._rows)
        restored = _unpacked(block, _without(merged, wide, rows) if block.others is not None else merged)
        if zlib.crc32(_bytes(restored)) != block.checksum:
            raise StateError(
                "the original weight cannot be restored from what keep='packed' kept: the merged weight was changed, "
                "or this machine computes the update differently; nothing was written"
            )
        return restored


class PackedKept(Mapping[str, Tensor]):
    """The original tensors of a merged layer by name, restored when they are asked for.

    Args:
        module: holds the merged weight.
        packing: what restores the weight.
    """

    def __init__(self, module: nn.Module, kind: Kind, site: Site, packing: Packing) -> None:
        self._module = module
        self._kind = kind
        self._site = site
        self._packing = packing

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return self._packing.nbytes

    def __getitem__(self, name: str) -> Tensor:
        if name != self._kind.weight_name:
            raise KeyError(name)
        merged = getattr(self._module, name).detach()
        try:
            matrix = self._packing.original(self._kind.to_matrix(self._site, merged))
        except StateError as error:
            raise StateError(f"{self._site.name!r}: {error}") from None
        return self._kind.from_matrix(self._site, matrix)

    def __iter__(self) -> Iterator[str]:
        return iter((self._kind.weight_name,))

    def __len__(self) -> int:
        return 1


def _wide(factors: Sequence[tuple[Tensor, Tensor, float]]) -> list[tuple[Tensor, Tensor, float]]:
    return [(B, A.double(), scale) for B, A, scale in factors]


def _without(merged: Tensor, factors: Sequence[tuple[Tensor, Tensor, float]], rows: slice) -> Tensor:
    """Return merged rows with the update taken off again, rounded to their dtype."""
    sums = merged.double()
    for B, A, scale in factors:
        sums.addmm_(B[rows].double(), A, alpha=-scale)
    return sums.to(merged.dtype)


def _packed(original: Tensor, guess: Tensor) -> _Block:
    bits = _BITS[original.dtype]
    original = original.contiguous()
    checksum = zlib.crc32(_bytes(original))
    wanted = original.view(-1).view(bits)
    apart = wanted - guess.contiguous().view(-1).view(bits)
    far = (apart < -1).logical_or_(apart > 1)
    codes = (apart + 1).masked_fill_(far, _ELSEWHERE).to(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.numel() % 4)).view(-1, 4)
    packed = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
    where = far.nonzero().squeeze(-1).to(torch.int32)
    steps = torch.diff(where, prepend=where.new_zeros(1))
    others = zlib.compress(_planes(steps) + _planes(apart[far]), 1)
    block = _Block(zlib.compress(_bytes(packed), 1), others, checksum)
    return (
        block if block.nbytes < original.numel() * original.element_size() else _Block(_bytes(original), None, checksum)
    )


def _unpacked(block: _Block, guess: Tensor) -> Tensor:
    bits = _BITS[guess.dtype]
    if block.others is None:
        return _tensor(block.codes, guess.dtype).view(guess.shape)
    count = guess.numel()
    packed = _tensor(zlib.decompress(block.codes), torch.uint8)
    codes = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).view(-1)[:count]
    restored = guess.contiguous().view(-1).view(bits) + (codes.to(bits) - 1)
    others = zlib.decompress(block.others)
    if others:
        number = len(others) // (4 + bits.itemsize)
        where = _from_planes(others[: 4 * number], torch.int32).cumsum(0)
        # its code was taken for a difference of 2
        restored[where] += _from_planes(others[4 * number :], bits) - (_ELSEWHERE - 1)
    return restored.view(guess.dtype).view(guess.shape)


def _planes(numbers: Tensor) -> bytes:
    """Return the first bytes of all numbers, then the second ones, and so on: high bytes are mostly alike."""
    return _bytes(numbers.contiguous().view(torch.uint8).view(-1, numbers.element_size()).t())


def _from_planes(content: bytes, dtype: torch.dtype) -> Tensor:
    return _tensor(content, torch.uint8).view(dtype.itemsize, -1).t().contiguous().view(-1).view(dtype)


def _bytes(tensor: Tensor) -> bytes:
    """Return the bytes of a tensor (without numpy, which torch would need)."""
    tensor = tensor.contiguous()
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size()) if tensor.numel() else b""


def _tensor(content: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)
