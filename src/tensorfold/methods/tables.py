"""Methods for embedding tables alone: one matrix product state a token, and graded low rank."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from tensorfold.algebra.solvers.graded import graded_low_rank
from tensorfold.algebra.solvers.graded_logits import match_probabilities
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.solvers.token_mps import token_mps_svd
from tensorfold.algebra.specs.graded import GradedSpec
from tensorfold.algebra.specs.token_modes import modes_of_rank, modes_within
from tensorfold.algebra.specs.token_mps import TokenMPSSpec
from tensorfold.algebra.statistics import COUNT_EXPONENT, Statistics
from tensorfold.methods.base import (
    NOTHING,
    Keep,
    Method,
    Positive,
    exactly_one,
)
from tensorfold.utils.validation import strict


@strict
class TokenMPS(Method):
    """One matrix product state a token, for embedding tables: TensorGPT, arXiv 2307.00526 and 2506.13514.

    Needs no text and no training, and tokens share nothing. With the paper's modes on a width of 768, ten twos, rank 1
    is 38.4 times smaller, rank 4 3.31 times.

    Args:
        modes: Factors of the width, in this order; their product may exceed the width (padding). By default the modes
            that keep most of a row at the size asked for; given a rank, at the size of the finest chain of that rank.
        rank: Cap on every bond; this or ``keep``.
        keep: Fraction of the parameters that stays at most; the largest rank that meets it is taken.
    """

    name: ClassVar[str] = "token-mps"
    tables_only: ClassVar[bool] = True

    modes: tuple[Positive, ...] | None = None
    rank: Positive | None = None
    keep: Keep | None = None

    def __post_init__(self) -> None:
        exactly_one("token-mps", rank=self.rank, keep=self.keep)

    def spec(self, out_features: int, in_features: int) -> TokenMPSSpec:
        if self.keep is not None:
            modes = self.modes or modes_within(in_features, self.keep)
            return TokenMPSSpec.within(out_features, in_features, modes, self.keep)
        assert self.rank is not None
        modes = self.modes or modes_of_rank(in_features, self.rank)
        return TokenMPSSpec(out_features, in_features, modes, self.rank)

    @property
    def rowwise(self) -> bool:
        return True

    @property
    def fits_text(self) -> bool:
        return False

    def solve(self, weight: Tensor, spec: TokenMPSSpec, known: Statistics = NOTHING) -> Factors:
        return Factors(token_mps_svd(weight, spec))


@strict
class Graded(Method):
    """Low rank that falls from frequent tokens to rare ones, for embedding tables; the most frequent stay exact.

    With calibration text, tokens are ordered by how often all of it uses them, their errors weigh ``count^exponent``
    and are measured by what they cost at both ends of the model, and the rarer rows of a tied table are then fitted to
    the probabilities that the dense head gives. Without, tokens are taken to come in the order of Zipf's law,
    as byte-pair vocabularies nearly do.

    Args:
        keep: Fraction of the parameters that stays.
        slope: Exponent of the ranks, which fall as ``place^(−slope)``; 0 is low rank.
        exponent: Exponent of the counts.
    """

    name: ClassVar[str] = "graded"
    tables_only: ClassVar[bool] = True

    keep: Keep
    slope: Annotated[float, Ge(0)] = 1.1
    exponent: Annotated[float, Ge(0)] = COUNT_EXPONENT

    def spec(self, out_features: int, in_features: int) -> GradedSpec:
        return GradedSpec.within(out_features, in_features, self.keep, self.slope)

    @property
    def reads_states(self) -> bool:
        return True

    def solve(self, weight: Tensor, spec: GradedSpec, known: Statistics = NOTHING) -> Factors:
        inputs, weights = known.metrics(self.exponent)
        if weights is None:
            weights = torch.arange(1.0, spec.vocabulary + 1, dtype=torch.float64) ** -self.exponent
        factors = graded_low_rank(weight, spec, weights, inputs)
        if known.states is None or known.shares is None or known.gradient_moment is None:
            return factors
        return match_probabilities(weight, factors, spec, known.states, known.shares, known.gradient_moment)
