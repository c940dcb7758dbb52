"""Divisors near a number that was wished for."""

from __future__ import annotations

import pytest

from inlay.core.affine import Site
from inlay.core.divisors import nearest_divisor, two_factors, undivided


@pytest.mark.parametrize(("number", "wish", "found"), [(12, 5, 4), (12, 4, 4), (12, 9, 6), (12, 8, 6), (7, 3, 1)])
def test_nearest_divisor(number: int, wish: int, found: int) -> None:
    assert nearest_divisor(number, wish) == found


@pytest.mark.parametrize("size", range(1, 40))
@pytest.mark.parametrize("wish", [-1, 1, 4, 6, 50])
def test_two_factors(size: int, wish: int) -> None:
    first, second = two_factors(size, wish)
    assert first * second == size
    if wish > 0 and size % wish == 0:
        assert first == wish
    else:
        assert first <= second
        assert not any(size % other == 0 for other in range(first + 1, min(int(size**0.5), abs(wish)) + 1) if wish > 0)


def test_what_does_not_divide_a_weight() -> None:
    site = Site("layer", "linear", 8, 12)
    assert undivided(site, "k", 4) is None
    assert undivided(site, "k", 5) == "k=5 does not divide its 12 inputs; a divisor of 4 divides both sides"
    assert undivided(site, "k", 6) == "k=6 does not divide its 8 outputs; a divisor of 4 divides both sides"
    alone = undivided(Site("layer", "linear", 9, 8), "k", 4)
    assert alone == "k=4 does not divide its 9 outputs; no number but 1 divides both sides"
