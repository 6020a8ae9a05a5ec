"""Methods: each turns the shape of a matrix, and a budget, into a :class:`Spec`, and says which solver fills it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.orders.permutation import search_permutations
from tensorfold.algebra.orders.token_order import TokenOrder, token_order
from tensorfold.algebra.solvers.graded import GradedSpec, graded_low_rank
from tensorfold.algebra.solvers.graded_logits import match_probabilities
from tensorfold.algebra.solvers.solve import Factors, fit, norm_ratio
from tensorfold.algebra.solvers.starts import check_prunable, pruned, random_cores
from tensorfold.algebra.solvers.token_mps import TokenMPSSpec, token_mps_svd
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.specs.modes import balanced_modes, divisors
from tensorfold.algebra.specs.spec import Spec, attainable_ranks
from tensorfold.algebra.specs.token_modes import modes_of_rank, modes_within
from tensorfold.algebra.statistics import COUNT_EXPONENT, Metrics, Statistics
from tensorfold.errors import InputError, SpecError
from tensorfold.methods.base import (
    METHODS,
    NOTHING,
    Keep,
    Method,
    Positive,
    Seed,
    check_settings,
    exactly_one,
    largest_bond,
)
from tensorfold.utils.effects import Need, Needs
from tensorfold.utils.validation import strict

__all__ = ["METHODS", "MPO", "Graded", "Kronecker", "LowRank", "Method", "TokenMPS"]

_RANDOM = Need("init: random", lambda method: method.init == "random")
_PRUNE = Need("init: prune", lambda method: method.init == "prune")
_NOT_REFINED = Need("another init than data-aware, which refines by itself", lambda method: method.init != "data-aware")
_UNITS = Need("an MLP among its targets, or permute: all", lambda use: use.hidden or use.method.permute == "all")


@strict
class LowRank(Method):
    """``W ≈ U V`` with U (out, rank) and V (rank, in): every SVD method. ``rank · (out + in)`` parameters.

    Args:
        keep: Fraction of the parameters that stays; or
        rank: the rank itself.
        pivots: Keep rank rows of ``U V`` themselves and what mixes the others from them, ``rank · (out + in − rank)``
            parameters and as many multiply–adds for the same matrix: see ``algebra.pivots``.
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


@strict
class Kronecker(Method):
    """``W ≈ Σ_k s_k A_k ⊗ B_k``, A_k of shape (m1, n1): Krony-PT, arXiv 2412.12351.

    ``terms · (m1·n1 + m2·n2)`` parameters.

    Args:
        factor: (m1, n1) for a matrix with at least as many rows as columns; mirrored to (n1, m1) for the others, so
            one setting serves an expanding matrix and the contracting one after it.
        terms: Number of summands; with ``factor`` it defaults to 1.
        keep: Fraction of the parameters that stays, instead of ``terms`` (and of ``factor``, which is then chosen:
            the fewest terms within 2 % of the budget among full-rank shapes that cost no more multiply–adds than
            the dense matrix).
        init: Where the factors come from; ``van-loan`` by default, refined where there is calibration text.

            - ``van-loan``: the nearest sum in the Frobenius norm.
            - ``normalized``: the same times ``α = ‖W‖ / ‖Ŵ‖``, as scalars where there are any (Krony-PT, version 2);
              with ``refine``, the refined cores and their norms in the metrics of the fit.
            - ``prune``: every other hidden unit, ``W_even ⊗ [1, ε]ᵀ`` or ``⊗ [1, ε]``, for the shape that halves the
              hidden dimension.
            - ``random``: entries with the variance of W's.
            - ``data-aware``: weighted alternating least squares from Van Loan; needs calibration text.
        refine: Weighted alternating least squares from whatever ``init`` gave; needs calibration text.
        epsilon: The ε of pruning: 0 in Krony-PT's code, 0.1 in its text.
        scalars: One trainable number per term: true to start at 1 (α where normalised), or the number to start at.
        permute: Reorder indices to lower the error (TQCompressor, arXiv 2401.16367): ``hidden`` the MLP's hidden units,
            absorbed by the neighbours; ``all`` also the residual side, whose order is stored and applied at run time.
        pad: Let ``factor`` leave the last block of rows or columns unfilled (zero padding) where it does not divide the
            matrix, as a vocabulary of 50257 = 29 · 1733; without it that is an error.
        order: Of an embedding table's tokens, stored with the weights: their ``own``, by falling ``frequency`` in the
            calibration text, or ``cluster``, similar rows next to each other; see ``algebra.token_order``.
        seed: Of ``random``.
    """

    name: ClassVar[str] = "kronecker"
    needs: ClassVar[Needs] = {"refine": (_NOT_REFINED,), "epsilon": (_PRUNE,), "seed": (_RANDOM,)}
    needs_of_use: ClassVar[Needs] = {"permute": (_UNITS,)}

    factor: tuple[Positive, Positive] | None = None
    terms: Positive | None = None
    keep: Keep | None = None
    init: Literal["van-loan", "normalized", "prune", "random", "data-aware"] | None = None
    refine: bool = False
    epsilon: float = 0.0
    scalars: bool | float = False
    permute: Literal["none", "hidden", "all"] = "none"
    pad: bool = False
    order: TokenOrder = "own"
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.keep is not None and self.terms is not None:
            raise InputError(f"kronecker: got keep={self.keep} and terms={self.terms}; needed one of the two.")
        if self.keep is None and self.factor is None:
            raise InputError("kronecker: got neither factor nor keep; needed factor=(m1, n1) or keep.")
        if self.pad and self.factor is None:
            raise InputError("kronecker: pad=True without factor; keep alone chooses factors that divide. Drop pad.")
        if self.permute != "none" and (self.pad or self.order != "own"):
            other = "pad=True" if self.pad else f"order: {self.order}"
            raise InputError(f"kronecker: got permute: {self.permute} and {other}; needed one of the two.")
        check_settings(self)

    @property
    def reorders_hidden(self) -> bool:
        return self.permute != "none"

    @property
    def token_order(self) -> TokenOrder:
        return self.order

    def spec(self, out_features: int, in_features: int) -> Spec:
        expanding = out_features >= in_features
        if self.factor is None:
            shapes = [(m, n) for m in divisors(out_features) for n in divisors(in_features)]
        else:
            shapes = [self.factor if expanding else self.factor[::-1]]
        if self.keep is not None:
            return self._within_budget(out_features, in_features, shapes)
        return self._spec(out_features, in_features, shapes[0], self.terms or 1)

    def _spec(self, out_features: int, in_features: int, factor: tuple[int, int], terms: int) -> Spec:
        side = ("in",) if out_features >= in_features else ("out",)
        reordered = ("out",) if self.order != "own" else side if self.permute == "all" else ()
        scalars = self.scalars is not False
        return Spec.kronecker(
            out_features, in_features, factor, terms, scalars=scalars, reordered=reordered, pad=self.pad
        )

    def _within_budget(self, out_features: int, in_features: int, shapes: list[tuple[int, int]]) -> Spec:
        assert self.keep is not None
        dense = out_features * in_features
        budget = math.floor(self.keep * dense)
        candidates = []
        for m1, n1 in shapes:
            one = self._spec(out_features, in_features, (m1, n1), 1)
            largest = attainable_ranks(one.out_modes, one.in_modes)[0]
            terms = min(budget // one.parameters, largest)
            if terms < 1:
                continue
            spec = self._spec(out_features, in_features, (m1, n1), terms)
            waste = budget - spec.parameters
            if waste >= one.parameters:
                continue
            narrow = spec.attainable_matrix_rank < min(out_features, in_features) or spec.macs > dense
            candidates.append(((narrow, waste > 0.02 * budget, terms, waste, -m1), spec))
        if not candidates:
            smallest = min(self._spec(out_features, in_features, shape, 1).parameters for shape in shapes)
            largest_bond("kronecker", self.keep, dense, smallest)
            raise SpecError(f"kronecker: no shape of a {out_features}×{in_features} matrix meets keep={self.keep}.")
        return min(candidates, key=lambda c: c[0])[1]

    @property
    def fits_text(self) -> bool:
        return self.refine or self.init in (None, "data-aware")

    def check(self, spec: Spec, calibrated: bool) -> None:
        super().check(spec, calibrated)
        if not calibrated and (self.refine or self.init == "data-aware"):
            raise InputError(
                "kronecker: init: data-aware and refine need calibration text, and tables of positions have none; give "
                "some, or drop them."
            )
        if self.init == "prune":
            check_prunable(spec)

    def solve(self, weight: Tensor, spec: Spec, known: Statistics = NOTHING) -> Factors:
        self.check(spec, known.known)
        out_order, in_order = token_order(self.order, weight, known.counts), None
        if out_order is None and spec.reordered:
            found = search_permutations(weight, spec, rows="out" in spec.reordered, columns="in" in spec.reordered)
            out_order, in_order = (order.to(weight.device) for order in (found.row_order, found.column_order))
        weight = weight if out_order is None else weight[out_order]
        weight = weight if in_order is None else weight[:, in_order]
        cores = self._initial(weight, spec)
        metrics = known.metrics().reordered(out_order, in_order) if self.fits_text else Metrics()
        if known.known and self.fits_text:
            cores = fit(weight, spec, metrics.inputs, cores, metrics.outputs)
        alpha = norm_ratio(weight, to_dense(cores, spec), *metrics) if self.init == "normalized" else 1.0
        scalars = None
        if spec.scalars:
            value = alpha if self.scalars is True else float(self.scalars)
            scalars = torch.full((spec.ranks[0],), value)
        elif alpha != 1.0:
            cores = [core * alpha**0.5 for core in cores]
        return Factors(cores, scalars, out_order, in_order)

    def _initial(self, weight: Tensor, spec: Spec) -> list[Tensor]:
        if self.init == "prune":
            return pruned(weight, spec, self.epsilon)
        if self.init == "random":
            return random_cores(weight, spec, self.seed)
        return tt_svd(weight, spec)


@strict
class MPO(Method):
    """A chain of ``sites`` cores with bond dimension ``bond``: tensor-train layers, arXiv 1509.06569 and 2603.28534.

    Args:
        bond: Bond dimension χ; near the ends of the chain a bond is what its cut can have, where that is less.
        keep: Fraction of the parameters that stays, instead of ``bond``.
        sites: Number of sites, with balanced modes (padded where a size has no balanced factorisation).
        out_modes, in_modes: The modes themselves, instead of ``sites``; their products may exceed the matrix (padding).
        init: Where the cores come from; ``tt-svd`` by default, refined where there is calibration text.

            - ``tt-svd``: the TT-SVD alone.
            - ``random``: normal cores whose product has the root mean square of W, so a freshly made layer keeps the
              variance of its output; for training from scratch.
        order: Of an embedding table's tokens, stored with the weights: their ``own``, by falling ``frequency`` in the
            calibration text, or ``cluster``, similar rows next to each other; see ``algebra.token_order``.
        seed: Of ``random``.
    """

    name: ClassVar[str] = "mpo"
    needs: ClassVar[Needs] = {"seed": (_RANDOM,)}

    bond: Positive | None = None
    keep: Keep | None = None
    sites: Annotated[int, Ge(1), Le(64)] | None = None
    out_modes: tuple[Positive, ...] | None = None
    in_modes: tuple[Positive, ...] | None = None
    init: Literal["tt-svd", "random"] | None = None
    order: TokenOrder = "own"
    seed: Seed = 0

    def __post_init__(self) -> None:
        exactly_one("mpo", bond=self.bond, keep=self.keep)
        if (self.out_modes is None) != (self.in_modes is None):
            raise InputError("mpo: got one of out_modes and in_modes; needed both, or sites.")
        if len(self.out_modes or ()) != len(self.in_modes or ()):
            raise InputError(
                f"mpo: got out_modes {self.out_modes} and in_modes {self.in_modes}; needed as many of the one as of "
                "the other. Pad the shorter with 1."
            )
        if self.out_modes is not None and self.sites is not None:
            raise InputError("mpo: got both sites and modes; needed one of the two.")
        check_settings(self)

    @property
    def token_order(self) -> TokenOrder:
        return self.order

    def spec(self, out_features: int, in_features: int) -> Spec:
        if self.out_modes is not None and self.in_modes is not None:
            out_modes, in_modes = self.out_modes, self.in_modes
        else:
            out_modes, in_modes = (balanced_modes(size, self.sites or 2) for size in (out_features, in_features))

        def with_bond(bond: int) -> Spec:
            spec = Spec.from_modes(out_modes, in_modes, bond, out_features, in_features)
            return spec if self.order == "own" else replace(spec, reordered=("out",))

        if self.bond is not None:
            return with_bond(self.bond)
        assert self.keep is not None
        budget = math.floor(self.keep * out_features * in_features)
        low, high = 1, max(attainable_ranks(out_modes, in_modes), default=1)
        if with_bond(low).parameters > budget:
            largest_bond("mpo", self.keep, out_features * in_features, with_bond(1).parameters)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if with_bond(middle).parameters <= budget else (low, middle - 1)
        return with_bond(low)

    @property
    def fits_text(self) -> bool:
        return self.init is None

    def solve(self, weight: Tensor, spec: Spec, known: Statistics = NOTHING) -> Factors:
        out_order = token_order(self.order, weight, known.counts)
        weight = weight if out_order is None else weight[out_order]
        if self.init == "random":
            cores = random_cores(weight, spec, self.seed)
        else:
            metrics = known.metrics().reordered(out_order, None) if self.fits_text else Metrics()
            cores = fit(weight, spec, metrics.inputs, outputs=metrics.outputs)
        return Factors(cores, out_order=out_order)


@strict
class TokenMPS(Method):
    """One matrix product state a token, for embedding tables: TensorGPT, arXiv 2307.00526 and 2506.13514.

    Needs no text and no training, and tokens share nothing. With the paper's modes on a width of 768, ten twos, rank 1
    is 38.4 times smaller, rank 4 3.31 times.

    Args:
        modes: How the width is factored, in this order; the product may exceed the width (padding). By default those
            that keep most of a row at the size asked for; of a rank, at the size of the finest chain with such bonds.
        rank: Cap on every bond; or
        keep: fraction of the parameters that stays at most, by the largest rank that meets it.
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
        slope: Ranks fall as ``place^(−slope)``; 0 is low rank.
        exponent: Of the counts.
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
        if known.states is None or known.shares is None or known.gradients is None:
            return factors
        return match_probabilities(weight, factors, spec, known.states, known.shares, known.gradients)
