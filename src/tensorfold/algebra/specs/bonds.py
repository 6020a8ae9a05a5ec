"""Bonds of a chain of sites: how large they can be, and whether given ones fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tensorfold.errors import SpecError


def attainable_ranks(out_modes: Sequence[int], in_modes: Sequence[int]) -> tuple[int, ...]:
    """Largest rank of each interior unfolding: the smaller side of the cut, ``min(prefix, suffix)``; sites − 1 numbers.

    >>> attainable_ranks((768, 4), (768, 1))
    (4,)
    """
    sizes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def check_ranks(out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Check that cores of these modes can have these bonds.

    Raises:
        SpecError: A bond exceeds its unfolding's rank or its cores' size; the message names the largest attainable.
    """
    attainable = attainable_ranks(out_modes, in_modes)
    for k, (rank, largest) in enumerate(zip(ranks, attainable, strict=True)):
        if rank > largest:
            raise SpecError(
                f"Spec: bond {k + 1} = {rank} is more than out_modes {out_modes} and in_modes "
                f"{in_modes} can have; the largest attainable there is {largest}."
            )
    bonds = (1, *ranks, 1)
    for k, (m, n) in enumerate(zip(out_modes, in_modes, strict=True)):
        left, right = bonds[k], bonds[k + 1]
        for bond, rank, neighbour in ((k + 1, right, left), (k, left, right)):
            if rank > neighbour * m * n:
                raise SpecError(
                    f"Spec: bond {bond} = {rank} cannot be reached across site {k + 1} with modes ({m}, {n}) from "
                    f"its other bond {neighbour}; the largest attainable there is {neighbour * m * n}."
                )


def positive_integers(name: str, values: Any) -> tuple[int, ...]:
    """Convert a field's values to a tuple of positive integers.

    Raises:
        SpecError: They are something else; the message names the field.
    """
    try:
        out = tuple(values)
    except TypeError:
        raise SpecError(f"Spec: {name}={values!r}; needed a sequence of positive integers.") from None
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in out):
        raise SpecError(f"Spec: {name}={out}; needed positive integers.")
    return out
