"""Sums of Kronecker products: Krony-PT, and TQCompressor with permutations."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tensorfold.algebra.contraction.apply import to_dense
from tensorfold.algebra.orders.permutation import search_permutations
from tensorfold.algebra.orders.token_order import TokenOrder, token_order
from tensorfold.algebra.solvers.solve import Factors, fit, norm_ratio
from tensorfold.algebra.solvers.starts import check_prunable, pruned, random_cores
from tensorfold.algebra.solvers.ttsvd import tt_svd
from tensorfold.algebra.specs.bonds import attainable_ranks
from tensorfold.algebra.specs.modes import divisors
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.statistics import Metrics, Statistics
from tensorfold.errors import InputError, SpecError
from tensorfold.methods.base import (
    NOTHING,
    Keep,
    Method,
    Positive,
    Seed,
    check_settings,
    largest_bond,
)
from tensorfold.utils.effects import Need, Needs
from tensorfold.utils.validation import strict

_RANDOM = Need("init: random", lambda method: method.init == "random")
_PRUNE = Need("init: prune", lambda method: method.init == "prune")
_NOT_REFINED = Need("another init than data-aware, which refines by itself", lambda method: method.init != "data-aware")
_UNITS = Need("an MLP among its targets, or permute: all", lambda use: use.hidden or use.method.permute == "all")


@strict
class Kronecker(Method):
    """Sum of Kronecker products ``W ≈ Σ_k s_k A_k ⊗ B_k``, A_k (m1, n1), B_k (m2, n2): Krony-PT, arXiv 2412.12351.

    It has ``terms · (m1·n1 + m2·n2)`` parameters.

    Args:
        factor: (m1, n1) for a matrix with at least as many rows as columns; mirrored to (n1, m1) for the others, so
            one setting serves an expanding matrix and the contracting one after it.
        terms: Number of summands; with ``factor`` it defaults to 1.
        keep: Fraction of the parameters that stays, instead of ``terms`` (and of ``factor``, which is then chosen:
            the fewest terms within 2 % of the budget among full-rank shapes that cost no more multiply–adds than
            the dense matrix).
        init: Where the factors come from; ``van-loan`` by default, refined where there is calibration text.

            - ``van-loan``: the nearest sum in the Frobenius norm.
            - ``normalized``: the nearest sum times ``α = ‖W‖ / ‖Ŵ‖``, as scalars where there are any (Krony-PT,
              version 2); with ``refine``, the refined cores and ``α = ‖G^½ W C^½‖ / ‖G^½ Ŵ C^½‖``.
            - ``prune``: every other hidden unit, ``W_even ⊗ [1, ε]ᵀ`` or ``⊗ [1, ε]``, for the shape that halves the
              hidden dimension.
            - ``random``: normal cores for which entries of Ŵ have the mean square of W's.
            - ``data-aware``: weighted alternating least squares from Van Loan; needs calibration text.
        refine: Weighted alternating least squares from whatever ``init`` gave; needs calibration text.
        epsilon: The ε of pruning: 0 in Krony-PT's code, 0.1 in its text.
        scalars: One trainable number per term: true to start at 1 (α where normalised), or the number to start at.
        permute: Reorder indices to lower the error (TQCompressor, arXiv 2401.16367): ``hidden`` the MLP's hidden units,
            absorbed by the neighbours; ``all`` also the residual side, whose order is stored and applied at run time.
        pad: Let ``factor`` leave the last block of rows or columns unfilled (zero padding) where it does not divide the
            matrix, as a vocabulary of 50257 = 29 · 1733; without it that is an error.
        order: Order of an embedding table's tokens, stored with the weights: their ``own``, by falling ``frequency`` in
            the calibration text, or ``cluster``, similar rows next to each other; see ``algebra.orders.token_order``.
        seed: Seed of ``random``.
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
            cores = fit(weight, spec, metrics.input_moment, cores, metrics.gradient_moment)
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
