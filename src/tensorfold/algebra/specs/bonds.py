"""How large the bonds of a chain of sites can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tensorfold.errors import SpecError


def attainable_ranks(out_modes: Sequence[int], in_modes: Sequence[int]) -> tuple[int, ...]:
    """Largest rank each interior unfolding can have: the smaller side of the cut, ``min(prefix, suffix)``.

    >>> attainable_ranks((768, 4), (768, 1))
    (4,)
    """
    sizes = [m * n for m, n in zip(out_modes, in_modes, strict=True)]
    return tuple(min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes)))


def check_ranks(out_modes: Sequence[int], in_modes: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise :class:`SpecError`, naming the largest attainable, for a bond that no cores of these modes can fill."""
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
    """The values as a tuple, or :class:`SpecError` naming the field that holds something else."""
    try:
        out = tuple(values)
    except TypeError:
        raise SpecError(f"Spec: {name}={values!r}; needed a sequence of positive integers.") from None
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in out):
        raise SpecError(f"Spec: {name}={out}; needed positive integers.")
    return out
