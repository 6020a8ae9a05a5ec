"""Methods: each turns the shape of a matrix, and a budget, into a :class:`Spec`, and says which solver fills it.

A method is a frozen dataclass; subclassing :class:`Method` with a ``name`` is all it takes to make one known to recipes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from tensorfold.algebra.modes import balanced_modes, divisors
from tensorfold.algebra.solve import fit
from tensorfold.algebra.spec import Spec, attainable_ranks
from tensorfold.errors import InputError, SpecError
from tensorfold.strict import strict

METHODS: dict[str, type[Method]] = {}

Keep = Annotated[float, Gt(0), Lt(1)]
Positive = Annotated[int, Ge(1)]


class Factors(NamedTuple):
    """What a solver returns: cores of ``spec.core_shapes`` and, where the spec has them, the bond scalars (r,)."""

    cores: list[Tensor]
    scalars: Tensor | None = None


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. ``keep`` is the fraction of the dense parameters that stays; explicit shapes go without."""

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if "name" in cls.__dict__:
            METHODS[cls.name] = cls

    @abstractmethod
    def spec(self, out_features: int, in_features: int) -> Spec:
        """The spec for a matrix of this shape; never above ``keep``, and less than one bond step below it.

        Raises:
            SpecError: The shape cannot be met; the message names the nearest that can.
        """

    def solve(self, weight: Tensor, spec: Spec, metric: Tensor | None = None) -> Factors:
        """Fill the cores of ``spec`` for ``weight`` (out, in), in the metric of the inputs where one is given."""
        return Factors(fit(weight, spec, metric))


def _exactly_one(method: str, **given: object) -> None:
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InputError(f"{method}: got {' and '.join(named) or 'nothing'}; needed exactly one of {', '.join(given)}.")


def _largest_bond(method: str, keep: float, dense: int, step: int) -> int:
    """How many bond steps of ``step`` parameters fit in ``keep`` of ``dense`` ones.

    Raises:
        SpecError: Not even one fits.
    """
    bond = math.floor(keep * dense / step)
    if bond < 1:
        raise SpecError(
            f"{method}: keep={keep} leaves {math.floor(keep * dense)} of {dense} parameters, but the smallest bond "
            f"already takes {step}; keep at least {step / dense:.4f}, or exclude this module."
        )
    return bond


@strict
class LowRank(Method):
    """``W ≈ U V`` with U (out, rank) and V (rank, in): every SVD method. ``rank · (out + in)`` parameters.

    Args:
        keep: Fraction of the parameters that stays; or
        rank: the rank itself.
    """

    name: ClassVar[str] = "low-rank"

    keep: Keep | None = None
    rank: Positive | None = None

    def __post_init__(self) -> None:
        _exactly_one("low-rank", keep=self.keep, rank=self.rank)

    def spec(self, out_features: int, in_features: int) -> Spec:
        rank = self.rank
        if self.keep is not None:
            rank = _largest_bond("low-rank", self.keep, out_features * in_features, out_features + in_features)
        assert rank is not None
        return Spec.low_rank(out_features, in_features, rank)


@strict
class Kronecker(Method):
    """``W ≈ Σ_k A_k ⊗ B_k``, A_k of shape (m1, n1): Krony-PT, arXiv 2412.12351. ``terms · (m1·n1 + m2·n2)`` parameters.

    Args:
        factor: (m1, n1) for a matrix with at least as many rows as columns; mirrored to (n1, m1) for the others, so
            one setting serves an expanding matrix and the contracting one after it.
        terms: Number of summands; with ``factor`` it defaults to 1.
        keep: Fraction of the parameters that stays, instead of ``terms`` (and of ``factor``, which is then chosen:
            the fewest terms within 2 % of the budget among full-rank shapes that cost no more multiply–adds than
            the dense matrix).
        init: Where the factors come from.
        scalars: One trainable number per term.
    """

    name: ClassVar[str] = "kronecker"

    factor: tuple[Positive, Positive] | None = None
    terms: Positive | None = None
    keep: Keep | None = None
    init: Literal["van-loan"] = "van-loan"
    scalars: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None and self.terms is not None:
            raise InputError(f"kronecker: got keep={self.keep} and terms={self.terms}; needed one of the two.")
        if self.keep is None and self.factor is None:
            raise InputError("kronecker: got neither factor nor keep; needed factor=(m1, n1) or keep.")

    def spec(self, out_features: int, in_features: int) -> Spec:
        if self.factor is not None:
            m1, n1 = self.factor if out_features >= in_features else self.factor[::-1]
            if self.keep is None:
                terms = self.terms or 1
                return Spec.kronecker(out_features, in_features, (m1, n1), terms, scalars=self.scalars)
            shapes: Iterator[tuple[int, int]] = iter([(m1, n1)])
        else:
            shapes = ((m, n) for m in divisors(out_features) for n in divisors(in_features))
        return self._within_budget(out_features, in_features, list(shapes))

    def _within_budget(self, out_features: int, in_features: int, shapes: list[tuple[int, int]]) -> Spec:
        assert self.keep is not None
        dense = out_features * in_features
        budget = math.floor(self.keep * dense)
        candidates = []
        for m1, n1 in shapes:
            one = Spec.kronecker(out_features, in_features, (m1, n1), 1, scalars=self.scalars)
            largest = attainable_ranks(one.out_modes, one.in_modes)[0]
            terms = min(budget // one.parameters, largest)
            if terms < 1:
                continue
            spec = Spec.kronecker(out_features, in_features, (m1, n1), terms, scalars=self.scalars)
            waste = budget - spec.parameters
            if waste >= one.parameters:
                continue
            narrow = spec.attainable_matrix_rank < min(out_features, in_features) or spec.macs > dense
            candidates.append(((narrow, waste > 0.02 * budget, terms, waste, -m1), spec))
        if not candidates:
            _largest_bond(
                "kronecker", self.keep, dense, min(m * n + dense // (m * n) for m, n in shapes) + self.scalars
            )
            raise SpecError(f"kronecker: no shape of a {out_features}×{in_features} matrix meets keep={self.keep}.")
        return min(candidates, key=lambda c: c[0])[1]


@strict
class MPO(Method):
    """A chain of ``sites`` cores with bond dimension ``bond``: tensor-train layers, arXiv 1509.06569 and 2603.28534.

    Args:
        bond: Bond dimension χ; near the ends of the chain a bond is what its cut can have, where that is less.
        keep: Fraction of the parameters that stays, instead of ``bond``.
        sites: Number of sites, with balanced modes (padded where a size has no balanced factorisation).
        out_modes, in_modes: The modes themselves, instead of ``sites``; their products may exceed the matrix (padding).
    """

    name: ClassVar[str] = "mpo"

    bond: Positive | None = None
    keep: Keep | None = None
    sites: Positive | None = None
    out_modes: tuple[Positive, ...] | None = None
    in_modes: tuple[Positive, ...] | None = None

    def __post_init__(self) -> None:
        _exactly_one("mpo", bond=self.bond, keep=self.keep)
        if (self.out_modes is None) != (self.in_modes is None):
            raise InputError("mpo: got one of out_modes and in_modes; needed both, or sites.")
        if self.out_modes is not None and self.sites is not None:
            raise InputError("mpo: got both sites and modes; needed one of the two.")

    def spec(self, out_features: int, in_features: int) -> Spec:
        if self.out_modes is not None and self.in_modes is not None:
            out_modes, in_modes = self.out_modes, self.in_modes
        else:
            out_modes, in_modes = (balanced_modes(size, self.sites or 2) for size in (out_features, in_features))

        def with_bond(bond: int) -> Spec:
            return Spec.from_modes(out_modes, in_modes, bond, out_features, in_features)

        if self.bond is not None:
            return with_bond(self.bond)
        assert self.keep is not None
        budget = math.floor(self.keep * out_features * in_features)
        low, high = 1, max(attainable_ranks(out_modes, in_modes), default=1)
        if with_bond(low).parameters > budget:
            _largest_bond("mpo", self.keep, out_features * in_features, with_bond(1).parameters)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if with_bond(middle).parameters <= budget else (low, middle - 1)
        return with_bond(low)
