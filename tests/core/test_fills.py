"""How slots are filled beyond the usual distributions."""

from __future__ import annotations

import torch

from inlay.core.fills import Doubled, Given, Identity, Transposed, unit_vector
from inlay.core.slot import Init, Uniform


def filled(init: Init, *shape: int) -> torch.Tensor:
    tensor = torch.full(shape, torch.nan)
    init(tensor, torch.Generator().manual_seed(3))
    return tensor


def test_given_numbers() -> None:
    assert filled(Given((3, 1)), 2).tolist() == [3.0, 1.0]
    assert filled(Given([[1.5, 2.0]]), 1, 2).tolist() == [[1.5, 2.0]]


def test_identity() -> None:
    assert torch.equal(filled(Identity(), 2, 3, 3), torch.eye(3).expand(2, 3, 3))
    noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(3)) * 0.1
    torch.testing.assert_close(filled(Identity(0.1), 3, 3), torch.eye(3) + noise)


def test_transposed_matrices_are_drawn_as_they_lie() -> None:
    assert torch.equal(filled(Transposed(Uniform(1.0)), 2, 3, 4), filled(Uniform(1.0), 2, 4, 3).mT)
    drawn = filled(Uniform(1.0), 3, 2, 5, 4)
    assert torch.equal(filled(Transposed(Uniform(1.0), leading=True), 2, 3, 4, 5), drawn.permute(1, 0, 3, 2))


def test_doubled_columns_stand_beside_each_other() -> None:
    pairs = filled(Doubled(Uniform(1.0)), 3, 4)
    assert torch.equal(pairs[:, 0::2], pairs[:, 1::2])
    assert torch.equal(pairs[:, 0::2], filled(Uniform(1.0), 3, 2))


def test_a_direction_has_length_1() -> None:
    torch.testing.assert_close(torch.linalg.vector_norm(filled(unit_vector, 7)), torch.tensor(1.0))


def test_uniform_from_a_lower_end() -> None:
    drawn = filled(Uniform(1.0, low=0.0), 1000)
    assert float(drawn.min()) >= 0.0
    assert 0.4 < float(drawn.mean()) < 0.6
