"""Splitting a size into modes: divisors, and balanced factors with as little padding as balance allows."""

from __future__ import annotations

import math
from functools import lru_cache

from tensorfold.errors import SpecError


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """Divisors of ``n`` in ascending order."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(small + [n // d for d in reversed(small) if d * d != n])


def nearest_divisors(n: int, to: int) -> tuple[int, ...]:
    """Divisors of ``n`` on either side of ``to``: the largest up to it and the smallest above, where they exist."""
    below = [d for d in divisors(n) if d <= to]
    above = [d for d in divisors(n) if d > to]
    return tuple(below[-1:] + above[:1])


@lru_cache(maxsize=4096)
def _balanced_factors(n: int, count: int, smallest: int = 1) -> tuple[int, ...] | None:
    """Ascending factors of ``n``, each at least ``smallest``, with the smallest possible maximum."""
    if count == 1:
        return (n,) if n >= smallest else None
    best: tuple[int, ...] | None = None
    for d in divisors(n):
        if d < smallest:
            continue
        if d**count > n:
            break
        rest = _balanced_factors(n // d, count - 1, d)
        if rest is not None and (best is None or (rest[-1], -d) < (best[-1], -best[0])):
            best = (d, *rest)
    return best


@lru_cache(maxsize=4096)
def balanced_modes(size: int, sites: int) -> tuple[int, ...]:
    """Ascending modes of a number of sites: their product is the smallest ``>= size`` with no mode over twice another.

    A prime or awkward size is thereby padded; what lies beyond ``size`` is cut off wherever the matrix is read.

    >>> balanced_modes(768, 2), balanced_modes(768, 3), balanced_modes(50257, 2)
    ((24, 32), (8, 8, 12), (206, 244))
    """
    if size < 1 or sites < 1:
        raise SpecError(f"balanced_modes: size={size}, sites={sites}; both must be at least 1.")
    if sites == 1:
        return (size,)
    padded = size
    while True:
        modes = _balanced_factors(padded, sites)
        if modes is not None and modes[-1] <= 2 * modes[0]:
            return modes
        padded += 1


def powers_of_two(width: int) -> tuple[int, ...]:
    """Twos whose product is ``width`` or more: TensorGPT's modes, ten of them for 768.

    >>> len(powers_of_two(768)), len(powers_of_two(1024)), len(powers_of_two(1))
    (10, 10, 1)
    """
    return (2,) * max(1, (width - 1).bit_length())
