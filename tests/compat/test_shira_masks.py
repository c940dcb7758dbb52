"""Masks of SHiRA that users call or wrap."""

from __future__ import annotations

import peft.tuners.shira.mask_functions as theirs
import pytest
import torch
from torch import nn

from inlay.compat.masks import random_mask


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_entries_are_pefts(seed, dtype):
    layer = nn.Linear(7, 9, dtype=dtype)
    torch.manual_seed(5)
    expected = theirs.random_mask(layer, 2, seed)
    torch.manual_seed(5)
    found = random_mask(layer, 2, seed)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert int(found.sum()) == 2 * (7 + 9)
