"""Divisors near a number that was wished for."""

from __future__ import annotations

import math

from inlay.core.affine import Site

__all__ = ["nearest_divisor", "two_factors", "undivided"]


def nearest_divisor(number: int, wish: int) -> int:
    """Return the divisor of ``number`` closest to ``wish``, the smaller of two."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wish), divisor))


def two_factors(size: int, wish: int) -> tuple[int, int]:
    """Return two numbers whose product is ``size``; the first is ``wish``, or what comes nearest from below.

    Without a wish (-1), or with one that does not divide, the first is not larger than the second.
    """
    if wish > 0 and size % wish == 0:
        return wish, size // wish
    limit = min(math.isqrt(size), wish if wish > 0 else size)
    first = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return first, size // first


def undivided(site: Site, field: str, value: int) -> str | None:
    """Return one sentence that says which side of a weight a number does not divide, or None."""
    for size, side in ((site.fan_in, "inputs"), (site.out, "outputs")):
        if size % value:
            common = math.gcd(site.fan_in, site.out)
            rest = f"a divisor of {common} divides both sides" if common > 1 else "no number but 1 divides both sides"
            return f"{field}={value} does not divide its {size} {side}; {rest}"
    return None
