"""Steps of transformers' weight conversions that adapters need, under PEFT's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, ConversionOps

from inlay.checkpoint.migrations import block_diagonal, packed
from inlay.errors import CheckpointError, UnsupportedError

__all__ = ["FlattenDims", "PeftConcatenate", "PermuteDims"]


class _OneWay(ConversionOps):
    """A step that is not undone: adapters are saved as they are in memory."""

    def __init__(self, dims: int | tuple[int, ...]) -> None:
        self.dims = (dims,) if isinstance(dims, int) else tuple(dims)

    @property
    def reverse_op(self) -> ConversionOps:
        """Adapters are saved as they are in memory.

        Raises:
            NotAvailableError: always.
        """
        raise not_undone(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(dims={self.dims})"


def not_undone(step: object) -> UnsupportedError:
    from inlay.errors import NotAvailableError

    return NotAvailableError(f"{type(step).__name__} has no reverse: adapters are saved as they are in memory")


class FlattenDims(_OneWay):
    """Flatten the axes from ``dims[0]`` to ``dims[1]`` of every tensor into one."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return {name: tensor.flatten(*self.dims) for name, tensor in input_dict.items()}


class PermuteDims(_OneWay):
    """Bring the axes of every tensor into the order ``dims``."""

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return {name: tensor.permute(*self.dims) for name, tensor in input_dict.items()}


class PeftConcatenate(Concatenate):
    """Join the B factors of matrices that are stacked on one another: block-diagonally.

    Factors (out, r) give one of (sum of out, sum of r). Banks (experts, out, r) give one as checkpoints hold it,
    (sum of out, sum of r * experts), the expert running fastest.
    """

    @torch.no_grad()
    def convert(  # type: ignore[override]  # the base class has it in a decorator without a signature
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> dict[str, Any]:
        unknown = sorted(input_dict.keys() - set(source_patterns))
        if unknown:
            raise CheckpointError(f"{full_layer_name}: expected tensors of {source_patterns}, found {unknown}")
        tensors: list[Tensor] = [input_dict[name] for name in source_patterns if name in input_dict]
        axes = {tensor.dim() for tensor in tensors}
        if axes == {2}:
            return {full_layer_name: torch.block_diag(*tensors)}
        if axes != {3}:
            raise CheckpointError(
                f"{full_layer_name}: expected factors that all have 2 axes or all have 3, found {sorted(axes)}"
            )
        return {full_layer_name: packed(block_diagonal(tensors))}

    @property
    def reverse_op(self) -> ConversionOps:
        """Adapters are saved as they are in memory.

        Raises:
            NotAvailableError: always.
        """
        raise not_undone(self)
