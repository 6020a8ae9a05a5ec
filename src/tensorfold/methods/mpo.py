"""Matrix product operators: tensor-train layers with any number of sites."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Le
from torch import Tensor

from tensorfold.algebra.orders.token_order import TokenOrder, token_order
from tensorfold.algebra.solvers.solve import Factors, fit
from tensorfold.algebra.solvers.starts import random_cores
from tensorfold.algebra.specs.bonds import attainable_ranks
from tensorfold.algebra.specs.modes import balanced_modes
from tensorfold.algebra.specs.spec import Spec
from tensorfold.algebra.statistics import Metrics, Statistics
from tensorfold.errors import InputError
from tensorfold.methods.base import (
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

_RANDOM = Need("init: random", lambda method: method.init == "random")


@strict
class MPO(Method):
    """A chain of ``sites`` cores with bond dimension ``bond``: tensor-train layers, arXiv 1509.06569 and 2603.28534.

    Args:
        bond: Bond dimension χ; near the ends of the chain a bond is what its cut can have, where that is less.
        keep: Fraction of the parameters that stays, instead of ``bond``.
        sites: Number of sites, with balanced modes (padded where a size has no balanced factorisation).
        out_modes: Output mode of each site, instead of ``sites``; their product may exceed the matrix (padding).
        in_modes: Input mode of each site, likewise.
        init: Where the cores come from; ``tt-svd`` by default, refined where there is calibration text.

            - ``tt-svd``: the TT-SVD alone.
            - ``random``: normal cores whose product has the root mean square of W, so a freshly made layer keeps the
              variance of its output; for training from scratch.
        order: Order of an embedding table's tokens, stored with the weights: their ``own``, by falling ``frequency`` in
            the calibration text, or ``cluster``, similar rows next to each other; see ``algebra.orders.token_order``.
        seed: Seed of ``random``.
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
            cores = fit(weight, spec, metrics.input_moment, None, metrics.gradient_moment)
        return Factors(cores, out_order=out_order)
