"""Low rank: every method that is a truncated singular value decomposition, weighted or not."""

from __future__ import annotations

import math
from typing import ClassVar

from tensorfold.algebra.specs.spec import Spec
from tensorfold.methods.base import (
    Keep,
    Method,
    Positive,
    exactly_one,
    largest_bond,
)
from tensorfold.utils.validation import strict


@strict
class LowRank(Method):
    """Low rank ``W ≈ U V`` with U (out, rank) and V (rank, in), as in every SVD method.

    It has ``rank · (out + in)`` parameters.

    Args:
        keep: Fraction of the parameters that stays; this or ``rank``.
        rank: Rank of every matrix.
        pivots: Store ``rank`` rows of ``U V`` themselves and how the others are mixed from them,
            ``rank · (out + in − rank)`` parameters and multiply–adds for the same matrix; see
            ``algebra.solvers.pivots``.
    """

    name: ClassVar[str] = "low-rank"

    keep: Keep | None = None
    rank: Positive | None = None
    pivots: bool = False

    def __post_init__(self) -> None:
        exactly_one("low-rank", keep=self.keep, rank=self.rank)

    def spec(self, out_features: int, in_features: int) -> Spec:
        rank, both, dense = self.rank, out_features + in_features, out_features * in_features
        if self.keep is not None:
            rank = largest_bond("low-rank", self.keep, dense, both - 1 if self.pivots else both)
            if self.pivots:  # the largest r with r (out + in − r) within the budget
                rank = (both - math.isqrt(both * both - 4 * math.floor(self.keep * dense) - 1) - 1) // 2
        assert rank is not None
        return Spec.low_rank(out_features, in_features, rank, pivoted=self.pivots)
