"""Shape of a matrix product operator (MPO, also TT-matrix), which most structured matrices are.

    W[(i1 … iL), (j1 … jL)] = G1[i1, j1] · G2[i2, j2] · … · GL[iL, jL]

Core ``k`` has shape ``(ranks[k-1], out_modes[k], in_modes[k], ranks[k])``; the two outer bonds are 1. Low rank,
Kronecker products and their sums, the Van Loan decomposition and tensor trains differ only in their modes and bonds.
Sources: Oseledets, "Tensor-Train Decomposition" (2011); Novikov et al., arXiv 1509.06569.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

from tensorfold.algebra.contraction.paths import cheapest_order
from tensorfold.algebra.specs.bonds import attainable_ranks, check_ranks, positive_integers
from tensorfold.algebra.specs.chain import ChainStructure
from tensorfold.algebra.specs.modes import balanced_modes, nearest_divisors
from tensorfold.errors import SpecError


@dataclass(frozen=True)
class Spec(ChainStructure):
    """Shape of one matrix product operator; holds no weights.

    Args:
        out_modes: Output mode of each site; their product is the (padded) number of rows.
        in_modes: Input mode of each site; their product is the (padded) number of columns.
        ranks: Interior bonds only, ``len(ranks) == sites - 1``.
        out_features: Rows of the matrix stood for; defaults to ``prod(out_modes)``. Smaller means padding, which is cut
            off; larger, where this side is ``reordered``, that all rows but those in the stored order are zero.
        in_features: Columns of the matrix stood for; defaults to ``prod(in_modes)``. Smaller and larger as of rows.
        scalars: One trainable number per bond index of a two-site operator: ``Σ_k s_k A_k ⊗ B_k`` (Krony-PT).
        reordered: Sides, ``"out"`` and ``"in"``, whose index order is stored beside the cores and is not the matrix's
            own (TQCompressor's permutations). Orders are integers: no parameters, but ``order_bytes``.
        pivoted: Whether an identity takes the place of rank² numbers that a change of basis ``U R⁻¹ · R V`` makes
            superfluous, so that the rank can be up to a quarter higher at equal size. In low rank,
            ``W[order] = [I; T] S`` with S (rank, in) made of rows of W, the pivots, and T (out - rank, rank): an
            interpolative decomposition (Cheng, Gimbutas, Martinsson & Rokhlin 2005; as layers PIFA, arXiv 2501.19090).
            In groups of columns with one basis, modes (out, 1) and (groups, in / groups), that basis is ``[I, T]``, T
            (rank, in / groups - rank), over columns in a stored order that is the same in every group; likewise in
            groups of rows, modes (groups, out / groups) and (in, 1).

    Raises:
        SpecError: Modes and bonds do not fit together, or a bond exceeds what its unfolding can have.

    >>> spec = Spec(out_modes=(768, 4), in_modes=(768, 1), ranks=(1,))
    >>> spec.out_features, spec.in_features, spec.parameters, spec.macs
    (3072, 768, 589828, 592896)
    """

    kind: ClassVar[str] = "mpo"

    out_modes: tuple[int, ...]
    in_modes: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    out_features: int = 0
    in_features: int = 0
    scalars: bool = False
    reordered: tuple[str, ...] = ()
    pivoted: bool = False

    def __post_init__(self) -> None:
        for name in ("out_modes", "in_modes", "ranks"):
            object.__setattr__(self, name, positive_integers(name, getattr(self, name)))
        if not self.out_modes or len(self.out_modes) != len(self.in_modes):
            raise SpecError(
                f"Spec: got {len(self.out_modes)} out_modes {self.out_modes} and {len(self.in_modes)} in_modes "
                f"{self.in_modes}; every site needs one of each; pad the shorter list with 1."
            )
        if len(self.ranks) != self.sites - 1:
            raise SpecError(
                f"Spec: got {len(self.ranks)} ranks {self.ranks} for {self.sites} sites; interior bonds only, so "
                f"{self.sites - 1} are needed."
            )
        object.__setattr__(self, "reordered", tuple(self.reordered))
        if self.reordered not in ((), ("out",), ("in",), ("out", "in")):
            raise SpecError(f"Spec: reordered={self.reordered}; needed (), ('out',), ('in',) or ('out', 'in').")
        for side, modes in (("out", self.out_modes), ("in", self.in_modes)):
            name, padded = f"{side}_features", math.prod(modes)
            features = getattr(self, name) or padded
            ordered = side in self.reordered
            if not (isinstance(features, int) and features > 0 and (features <= padded or ordered)):
                raise SpecError(
                    f"Spec: {name}={features} does not fit {side}_modes {modes}, whose product is {padded}; "
                    f"give modes whose product is at least {features}, or a stored order of the rows or columns that "
                    "are not zero."
                )
            object.__setattr__(self, name, features)
        if self.scalars and self.sites != 2:
            raise SpecError(f"Spec: scalars sit on the one bond of two sites, got {self.sites} sites; drop scalars.")
        check_ranks(self.out_modes, self.in_modes, self.ranks)
        if self.pivoted and not self._can_pivot:
            raise SpecError(
                f"Spec: pivoted with out_modes {self.out_modes}, in_modes {self.in_modes}, ranks {self.ranks}, "
                f"reordered={self.reordered}; needed low rank, (out, 1) and (1, in), of a rank below out and "
                "reordered=('out',), or ('out', 'in') with zero columns; or groups of columns, (out, 1) and (groups, "
                "in / groups), of a rank below in / groups and reordered=('in',), or of rows likewise; all without "
                "padding or scalars."
            )

    @property
    def _can_pivot(self) -> bool:
        side = "out" if self.is_low_rank else self.grouped
        if side is None or self.is_padded or self.scalars or (self.is_partial and not self.is_low_rank):
            return False
        size = self.out_modes[0] if self.is_low_rank else max(self.out_modes[1], self.in_modes[1])
        sides = (side, "in") if self.is_low_rank and self.in_features > self.in_modes[1] else (side,)
        return self.reordered == sides and self.ranks[0] < size

    @classmethod
    def kronecker(
        cls,
        out_features: int,
        in_features: int,
        factor: Sequence[int],
        terms: int = 1,
        *,
        scalars: bool = False,
        reordered: Sequence[str] = (),
        pad: bool = False,
    ) -> Spec:
        """Sum of Kronecker products ``Σ_k A_k ⊗ B_k``.

        Args:
            out_features: Rows of the matrix.
            in_features: Columns of the matrix.
            factor: Shape (m1, n1) of every A_k.
            terms: Number of summands.
            scalars: Whether every term has a trainable number.
            reordered: Sides whose index order is stored.
            pad: Whether the shape of B_k is rounded up where ``factor`` does not divide the matrix.

        Raises:
            SpecError: ``factor`` does not divide the matrix without ``pad``, or is larger than it; or more terms than
                the rearranged matrix has rank.
        """
        m1, n1 = positive_integers("factor", factor)
        for name, features, part in (("out_features", out_features, m1), ("in_features", in_features, n1)):
            if features % part and not (pad and part < features):
                remedy = "pass pad=True" if part < features else f"needed at most {features}"
                raise SpecError(
                    f"Spec.kronecker: {name}={features} is not divisible by {part}; nearest divisors are "
                    f"{' and '.join(map(str, nearest_divisors(features, part)))}; {remedy}."
                )
        m2, n2 = -(-out_features // m1), -(-in_features // n1)
        return cls((m1, m2), (n1, n2), (terms,), out_features, in_features, scalars, tuple(reordered))

    @classmethod
    def low_rank(
        cls, out_features: int, in_features: int, rank: int, *, pivoted: bool = False, rows: int = 0, columns: int = 0
    ) -> Spec:
        """Low rank ``U V`` with U (out, rank) and V (rank, in): the MPO with modes (out, 1) and (1, in).

        It has ``rank · (out + in)`` parameters; ``rank · (out + in - rank)`` where ``pivoted``.

        Args:
            out_features: Rows of the matrix.
            in_features: Columns of the matrix.
            rank: Rank of the matrix.
            pivoted: Whether the pivots' identity is left out.
            rows: How many rows may differ from zero, where ``pivoted``; 0 is all. Only these have parameters.
            columns: How many columns may, likewise.

        Raises:
            SpecError: The sizes do not fit together, or ``rows`` or ``columns`` are given without ``pivoted``.
        """
        out, into = _kept(out_features, in_features, rows, columns)
        if not pivoted and (out, into) != (out_features, in_features):
            raise SpecError(f"Spec.low_rank: got rows={rows}, columns={columns} without pivoted=True, which they need.")
        sides = ("out", "in") if into < in_features else ("out",)
        modes = ((out, 1), (1, into))
        return cls(*modes, (rank,), out_features, in_features, reordered=sides if pivoted else (), pivoted=pivoted)

    @classmethod
    def mpo(cls, out_features: int, in_features: int, sites: int, bond: int) -> Spec:
        """Chain with balanced modes (padded where a size has no balanced factorisation).

        Args:
            out_features: Rows of the matrix.
            in_features: Columns of the matrix.
            sites: Number of sites.
            bond: Largest interior bond; near the ends of a chain unfoldings are smaller, and there the bond is what
                the cut can have.

        Raises:
            SpecError: No bond of the chain can be as large as ``bond``; the message names the largest.
        """
        return cls.from_modes(
            balanced_modes(out_features, sites), balanced_modes(in_features, sites), bond, out_features, in_features
        )

    @classmethod
    def from_modes(
        cls, out_modes: Sequence[int], in_modes: Sequence[int], bond: int, out_features: int = 0, in_features: int = 0
    ) -> Spec:
        """Chain with given modes, whose interior bonds are ``bond`` or, where smaller, what their cut can have.

        Args:
            out_modes: Output mode of each site.
            in_modes: Input mode of each site.
            bond: Largest interior bond.
            out_features: Rows of the matrix; the product of the modes if 0.
            in_features: Columns of the matrix; likewise.

        Raises:
            SpecError: ``bond`` is larger than every cut allows; the message names the largest.
        """
        attainable = attainable_ranks(out_modes, in_modes)
        if bond < 1 or bond > max(attainable, default=1):
            raise SpecError(
                f"Spec: bond dimension {bond} with out_modes {tuple(out_modes)} and in_modes {tuple(in_modes)}; the "
                f"largest attainable is {max(attainable, default=1)}."
            )
        ranks = tuple(min(bond, largest) for largest in attainable)
        return cls(tuple(out_modes), tuple(in_modes), ranks, out_features, in_features)

    @classmethod
    def partial(cls, out_features: int, in_features: int, rows: int = 0, columns: int = 0) -> Spec:
        """Dense matrix of which only some rows and columns may differ from zero.

        Args:
            out_features: Rows of the matrix.
            in_features: Columns of the matrix.
            rows: How many rows may differ from zero; 0 is all.
            columns: How many columns may, likewise.
        """
        kept = _kept(out_features, in_features, rows, columns)
        sides = tuple(s for s, k, f in zip(("out", "in"), kept, (out_features, in_features), strict=True) if k < f)
        return cls((kept[0],), (kept[1],), (), out_features, in_features, reordered=sides)

    @property
    def sites(self) -> int:
        """Number of cores."""
        return len(self.out_modes)

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape (left bond, out mode, in mode, right bond) of every core."""
        bonds = (1, *self.ranks, 1)
        return tuple(
            (bonds[k], m, n, bonds[k + 1]) for k, (m, n) in enumerate(zip(self.out_modes, self.in_modes, strict=True))
        )

    @property
    def stored_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shapes of what is stored of the cores: everything but the identity in one core of a pivoted spec."""
        if not self.pivoted:
            return self.core_shapes
        first, last = self.core_shapes
        rank = self.ranks[0]
        if self.has_pivot_rows:
            return (1, first[1] - rank, 1, rank), last
        return first, (rank, max(1, last[1] - rank), max(1, last[2] - rank), 1)  # one of them is 1

    @property
    def macs(self) -> int:
        """Multiply–adds a token, in the cheapest order of contracting the sites (:func:`.paths.cheapest_order`)."""
        if self.has_pivot_rows:
            return self.parameters
        return cheapest_order(self.out_modes, self.in_modes, self.ranks).macs

    @property
    def is_padded(self) -> bool:
        """Whether the modes make a larger matrix than (out_features, in_features); the rest is cut off."""
        return self.out_features < math.prod(self.out_modes) or self.in_features < math.prod(self.in_modes)

    @property
    def is_partial(self) -> bool:
        """Whether the modes make a smaller matrix than (out_features, in_features); other rows or columns are zero."""
        return self.out_features > math.prod(self.out_modes) or self.in_features > math.prod(self.in_modes)

    @cached_property
    def inner(self) -> Spec:
        """Spec of the part that may differ from zero: fewer rows and columns where it is partial, else itself."""
        if not self.is_partial:
            return self
        out_features = min(self.out_features, math.prod(self.out_modes))
        in_features = min(self.in_features, math.prod(self.in_modes))
        sides = tuple(
            s for s in self.reordered if getattr(self, f"{s}_features") <= math.prod(getattr(self, f"{s}_modes"))
        )
        sides = ("out",) if self.has_pivot_rows else sides
        return replace(self, out_features=out_features, in_features=in_features, reordered=sides)

    @property
    def is_low_rank(self) -> bool:
        """Whether the modes are (out, 1) and (1, in)."""
        return self.sites == 2 and self.out_modes[1] == 1 and self.in_modes[0] == 1

    @property
    def grouped(self) -> Literal["in", "out"] | None:
        """Side whose groups share one basis: ``"in"`` for ``A (I_g ⊗ B)``, ``"out"`` for its transpose, else None."""
        if self.sites != 2 or self.is_low_rank or (self.out_modes[1] == 1) == (self.in_modes[1] == 1):
            return None
        return "in" if self.out_modes[1] == 1 else "out"

    @property
    def has_pivot_rows(self) -> bool:
        """Whether it is pivoted low rank: other pivoted specs have their pivots in the basis of their groups."""
        return self.pivoted and self.is_low_rank

    @property
    def transposed(self) -> Spec:
        """Spec of Wᵀ, whose cores are W's with their two middle axes exchanged.

        Raises:
            SpecError: It is pivoted low rank: pivots are rows.
        """
        if self.has_pivot_rows:
            raise SpecError(f"Spec: {self} has rows for pivots, so its transpose is none of its kind.")
        sides = tuple(side for side, other in (("out", "in"), ("in", "out")) if other in self.reordered)
        modes = (self.in_modes, self.out_modes)
        features = (self.in_features, self.out_features)
        return Spec(*modes, self.ranks, *features, self.scalars, sides, self.pivoted)

    @property
    def attainable_matrix_rank(self) -> int:
        """Upper bound on the rank of W, such as min(m1, n1) · min(m2, n2) for one Kronecker term."""
        full = min(self.out_features, self.in_features)
        product = math.prod(min(m, n) for m, n in zip(self.out_modes, self.in_modes, strict=True))
        return min(full, product * math.prod(self.ranks))

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in a checkpoint's configuration; fields with their default values are left out."""
        out: dict[str, Any] = {
            "out_modes": list(self.out_modes),
            "in_modes": list(self.in_modes),
            "ranks": list(self.ranks),
        }
        if self.out_features != math.prod(self.out_modes):
            out["out_features"] = self.out_features
        if self.in_features != math.prod(self.in_modes):
            out["in_features"] = self.in_features
        if self.scalars:
            out["scalars"] = True
        if self.reordered:
            out["reordered"] = list(self.reordered)
        if self.pivoted:
            out["pivoted"] = True
        return out

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Spec:
        """Inverse of :meth:`to_dict`.

        Raises:
            SpecError: A key is missing or unknown, or the values do not fit together.
        """
        known = {"out_modes", "in_modes", "ranks", "out_features", "in_features", "scalars", "reordered", "pivoted"}
        if not isinstance(data, dict) or not {"out_modes", "in_modes", "ranks"} <= data.keys() <= known:
            raise SpecError(f"Spec: got {data!r}; needed out_modes, in_modes, ranks and at most {sorted(known)}.")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)

    def __str__(self) -> str:
        if self.is_low_rank:
            factors = f"{self.out_modes[0]}×{self.ranks[0]} · {self.ranks[0]}×{self.in_modes[1]}"
            kept = f" of {self.out_features}×{self.in_features}" if self.is_partial else ""
            return f"{factors}{kept}, pivoted" if self.pivoted else f"{factors}{kept}"
        sites = [f"{m}×{n}" for m, n in zip(self.out_modes, self.in_modes, strict=True)]
        if self.sites == 2:
            terms = f"{self.ranks[0]} × ({sites[0]} ⊗ {sites[1]})"
            return f"{terms}, pivoted" if self.pivoted else terms
        if self.sites == 1 and self.is_partial:
            return f"{sites[0]} of {self.out_features}×{self.in_features}"
        return " —".join([sites[0], *(f"{r}— {s}" for r, s in zip(self.ranks, sites[1:], strict=True))])


def _kept(out_features: int, in_features: int, rows: int, columns: int) -> tuple[int, int]:
    """Numbers of rows and columns that may differ from zero, where 0 says all.

    Raises:
        SpecError: There are more than the matrix has.
    """
    if not (0 <= rows <= out_features and 0 <= columns <= in_features):
        raise SpecError(f"Spec: got rows={rows}, columns={columns} of a {out_features}×{in_features} matrix.")
    return rows or out_features, columns or in_features
