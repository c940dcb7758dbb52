"""Values that are kept for as long as their sources stay as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inlay.core.remember import remember, remembered


@pytest.fixture(autouse=True)
def remembering():
    remember(True)
    yield
    remember(False)


def parameters(count):
    return [nn.Parameter(torch.randn(3, 3)) for _ in range(count)]


def total(*sources):
    return remembered(lambda: sum(source.detach() for source in sources), *sources)


def test_is_kept_until_a_source_is_written():
    first, second = parameters(2)
    kept = total(first, second)
    assert total(first, second) is kept
    with torch.no_grad():
        second.add_(1.0)
    assert torch.equal(total(first, second), first + second)


def test_another_parameter_in_the_place_of_a_source_is_seen():
    first, old, new = parameters(3)
    total(first, old)
    assert torch.equal(total(first, new), first + new)
    assert torch.equal(total(first, old), first + old)
