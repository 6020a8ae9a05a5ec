"""Low rank: every method that is a truncated singular value decomposition, weighted or not."""

from __future__ import annotations

import math
from typing import ClassVar

from tensorfold.algebra.specs.spec import Spec
from tensorfold.errors import SpecError
from tensorfold.methods.base import (
    Keep,
    Method,
    Positive,
    check_settings,
    exactly_one,
    largest_bond,
)
from tensorfold.utils.effects import Need, Needs
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
        multiple: What divides the rank that ``keep`` gives, which is rounded down to it: 32 for engines that store
            weights in groups of 32.
    """

    name: ClassVar[str] = "low-rank"
    needs: ClassVar[Needs] = {"multiple": (Need("keep", lambda given: given.keep is not None),)}

    keep: Keep | None = None
    rank: Positive | None = None
    pivots: bool = False
    multiple: Positive = 1

    def __post_init__(self) -> None:
        exactly_one("low-rank", keep=self.keep, rank=self.rank)
        check_settings(self)

    def spec(self, out_features: int, in_features: int) -> Spec:
        rank, both, dense = self.rank, out_features + in_features, out_features * in_features
        if self.keep is not None:
            rank = largest_bond("low-rank", self.keep, dense, both - 1 if self.pivots else both)
            if self.pivots:  # the largest r with r (out + in − r) within the budget
                rank = (both - math.isqrt(both * both - 4 * math.floor(self.keep * dense) - 1) - 1) // 2
            if rank < self.multiple:
                needed = self.multiple * (both - self.multiple * self.pivots) / dense
                raise SpecError(
                    f"low-rank: keep={self.keep} leaves a rank of {rank} and multiple={self.multiple}; "
                    + (f"keep at least {math.ceil(needed * 1e4) / 1e4:.4f}, " if needed < 0.9999 else "")
                    + "take a smaller multiple, or exclude this module."
                )
            rank -= rank % self.multiple
        assert rank is not None
        return Spec.low_rank(out_features, in_features, rank, pivoted=self.pivots)
