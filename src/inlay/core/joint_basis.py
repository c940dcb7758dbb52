"""One basis for the weights of all layers of a role (higher-order generalised singular value decomposition)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["joint_basis", "role_of"]


def role_of(path: str) -> str:
    """Return the role of a layer: what its path ends in, without the number of its block.

    ``layers.3.self_attn.q_proj`` is a ``self_attn_q_proj``, as PEFT names it in checkpoints. The output layer of an
    attention block, ``attention.output.dense`` in BERT, is no ``output_dense`` as the one of the block itself is.
    """
    *above, last = path.split(".")
    if not above or above[-1].isdigit():
        return last
    if (above[-1], last) == ("output", "dense") and above[-2:-1] == ["attention"]:
        return "attention_output"
    return f"{above[-1]}_{last}"


def joint_basis(matrices: Sequence[Tensor], ridge: float) -> Tensor:
    """Return V, (n, n), so that every matrix is ``U diag(l) V^T`` with columns of U that are nearly orthogonal.

    Args:
        matrices: (rows, n) each. Together they may have fewer rows than columns; V is then orthogonal.
        ridge: added to the diagonal of what is inverted.
    """
    stacked = torch.cat(list(matrices))
    rows, n = stacked.shape
    if rows < n:
        return torch.linalg.svd(stacked, full_matrices=True)[2].mT
    Q, R = torch.linalg.qr(stacked)
    mean, eye = torch.zeros_like(R), torch.eye(n, dtype=R.dtype, device=R.device)
    for part in Q.split([len(matrix) for matrix in matrices]):
        mean += torch.linalg.inv(part.mT @ part + ridge * eye)
    return R.mT @ torch.linalg.eigh(mean / len(matrices)).eigenvectors
