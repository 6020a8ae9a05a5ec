"""Modes of a token's matrix product state that keep most of a row at a given size, from the width alone.

Rows of an embedding table have next to no structure of their own, so modes are judged by what TT-SVD keeps of random
numbers. There the squared singular values of an unfolding (m, n), m ≤ n, follow Marchenko and Pastur's law of ratio
``c = m / n``: as ``λ = 1 + c + 2√c cos θ`` with a density of ``sin²θ / λ``, so that those with angles up to θ hold the
part ``(θ − sin θ cos θ) / π`` of the energy. A chain keeps about the product of these parts over its bonds. Few large
modes beat many small ones at equal size, and a padded column costs its share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from tensorfold.algebra.specs.modes import divisors, powers_of_two
from tensorfold.algebra.specs.token_mps import TokenMPSSpec

_LARGEST_PRIME = 7  # largest prime factor of a width that is not padded
_ANGLES = (np.arange(500) + 0.5) * (math.pi / 500)
_SINES = np.sin(_ANGLES)


@lru_cache(maxsize=256)
def modes_of_rank(width: int, rank: int) -> tuple[int, ...]:
    """Modes that keep most of a row with bonds up to ``rank``, at no more numbers than the finest chain of that rank.

    The finest chain has the prime factors of the width for modes.

    >>> modes_of_rank(576, 4), modes_of_rank(576, 1)
    ((24, 24), (3, 3, 4, 4, 4))
    """
    able = [spec for modes in _candidates(width) if (spec := TokenMPSSpec(1, width, modes, 1)).largest_rank >= rank]
    specs = [TokenMPSSpec(1, width, spec.modes, rank) for spec in able]
    if not specs:
        return powers_of_two(width)
    finest = [spec for spec in specs if spec.modes == _finest(width)]
    limit = min(spec.parameters_per_token for spec in finest or specs)
    return _best(spec for spec in specs if spec.parameters_per_token <= limit).modes


@lru_cache(maxsize=256)
def modes_within(width: int, keep: float) -> tuple[int, ...]:
    """Modes that keep most of a row with at most ``keep`` of its numbers; the finest where no modes have so few.

    >>> modes_within(576, 0.5), modes_within(576, 0.06)
    ((24, 24), (4, 6, 24))
    """
    smallest = (TokenMPSSpec(1, width, modes, 1) for modes in _candidates(width))
    usable = [spec for spec in smallest if spec.parameters_per_token <= keep * width]
    if not usable:
        return _finest(width)
    return _best(TokenMPSSpec.within(1, width, spec.modes, keep) for spec in usable).modes


def _best(specs: Iterator[TokenMPSSpec]) -> TokenMPSSpec:
    return min(specs, key=lambda spec: (-round(_kept(spec), 9), spec.parameters_per_token, spec.sites, spec.modes))


def _kept(spec: TokenMPSSpec) -> float:
    """Estimated part of a random row's energy that its chain of cores keeps."""
    kept, columns = spec.width / spec.padded_width, spec.padded_width
    for _, left, mode, right in spec.core_shapes[:-1]:
        columns //= mode
        kept *= _leading_part(left * mode, columns, right)
    return kept


@lru_cache(maxsize=4096)
def _leading_part(rows: int, columns: int, rank: int) -> float:
    """Part of the energy of a random matrix (rows, columns) in its ``rank`` largest singular values."""
    smaller = min(rows, columns)
    if rank >= smaller:
        return 1.0
    ratio = smaller / max(rows, columns)
    counted = np.cumsum(_SINES**2 / (1 + ratio + 2 * ratio**0.5 * np.cos(_ANGLES)))
    angle = float(np.interp(rank / smaller, counted / counted[-1], _ANGLES))
    return (angle - math.sin(angle) * math.cos(angle)) / math.pi


@lru_cache(maxsize=256)
def _candidates(width: int) -> tuple[tuple[int, ...], ...]:
    """Modes worth trying for a width, two sites or more: ascending, and with the two largest at the ends.

    A mode at an end has one bond only.
    """
    found: dict[tuple[int, ...], None] = {}
    for size in {width, _smooth(width)}:
        for modes in _factorisations(size, 2):
            if len(modes) > 1:
                found[modes] = None
                found[modes[-1], *modes[:-2], modes[-2]] = None
    return tuple(found) or (_finest(width),)


def _factorisations(size: int, smallest: int) -> Iterator[tuple[int, ...]]:
    """Ascending modes, each at least ``smallest``, whose product is ``size``; all that there are."""
    for mode in divisors(size):
        if smallest <= mode and mode * mode <= size:
            yield from ((mode, *rest) for rest in _factorisations(size // mode, mode))
    if size >= smallest:
        yield (size,)


def _smooth(width: int) -> int:
    """Smallest number from ``width`` on without a prime factor above 7."""
    return next(size for size in itertools.count(max(width, 2)) if _primes(size)[-1] <= _LARGEST_PRIME)


def _finest(width: int) -> tuple[int, ...]:
    """Modes of the finest chain: the prime factors of the width, padded where one is above 7."""
    return _primes(_smooth(width))


@lru_cache(maxsize=4096)
def _primes(size: int) -> tuple[int, ...]:
    """Prime factors of a number from 2 on, ascending."""
    for factor in range(2, math.isqrt(size) + 1):
        if size % factor == 0:
            return (factor, *_primes(size // factor))
    return (size,)
