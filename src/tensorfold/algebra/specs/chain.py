"""Products with the cores of a chain of sites; :mod:`.spec` describes the chain's shape.

Notation:
    W           matrix that the cores stand for, (m, n)
    core k      (left bond, out mode, in mode, right bond), the outer bonds 1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from tensorfold.algebra.contraction import apply as contraction
from tensorfold.algebra.contraction.paths import Chain
from tensorfold.algebra.precision import wide
from tensorfold.algebra.specs.bonds import attainable_ranks
from tensorfold.algebra.specs.structure import Structure


class ChainStructure(Structure):
    """A structure whose cores are one chain of sites, which may have pivots, padding and bond scalars."""

    shared_axes: ClassVar[int] = 2

    if TYPE_CHECKING:

        @property
        def out_modes(self) -> tuple[int, ...]: ...
        @property
        def in_modes(self) -> tuple[int, ...]: ...
        @property
        def ranks(self) -> tuple[int, ...]: ...
        @property
        def scalars(self) -> bool: ...
        @property
        def pivoted(self) -> bool: ...
        @property
        def sites(self) -> int: ...
        @property
        def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]: ...
        @property
        def has_pivot_rows(self) -> bool: ...
        @property
        def grouped(self) -> Literal["in", "out"] | None: ...
        @property
        def inner(self) -> Chain: ...

    @property
    def scalar_count(self) -> int:
        return self.ranks[0] if self.scalars else 0

    @property
    def kept_sizes(self) -> tuple[int, int]:
        return self.inner.out_features, self.inner.in_features

    @property
    def padded_parameters(self) -> int:
        return math.prod((*self.out_modes, *self.in_modes))

    @property
    def row_macs(self) -> int:
        """Multiply–adds of looking up one row: slices of the cores at its output modes, joined from left to right."""
        total, read = 0, self.in_modes[0]
        for left, _, columns, right in self.core_shapes[1:]:
            total += read * left * columns * right
            read *= columns
        return total

    @property
    def is_chain(self) -> bool:
        return True

    @property
    def largest_ranks(self) -> tuple[int, ...]:
        return attainable_ranks(self.out_modes, self.in_modes)

    def modes_and_ranks(self) -> dict[str, list[int]]:
        return {"out_modes": list(self.out_modes), "in_modes": list(self.in_modes), "ranks": list(self.ranks)}

    def apply(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """``x Wᵀ``, shape (..., n) → (..., m), through the sites in the order of fewest multiply–adds."""
        return contraction.apply(x, cores, self.inner)

    def dense(self, cores: Sequence[Tensor]) -> Tensor:
        """W, shape (m, n), padding cut off."""
        return contraction.to_dense(cores, self.inner)

    def rows(self, index: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """Rows of W, (tokens,) → (tokens, n), from the core slices that they need; float32 of cores in float16."""
        return contraction.rows(index, cores, self.inner)

    def complete(self, stored: list[Tensor], scalars: Tensor | None = None) -> list[Tensor]:
        """Cores of shapes ``core_shapes`` from what is stored: bond scalars multiplied in, identities on pivots added.

        Scalars go into the smaller factor; a core in float16 times scalars is in float32, where the product fits.

        Args:
            stored: Shapes ``stored_shapes``.
            scalars: Shape (terms,); None if the spec has none.
        """
        if self.pivoted:
            first, last = stored
            identity = torch.eye(self.ranks[0], dtype=first.dtype, device=first.device)  # (r, r)
            if self.has_pivot_rows:
                return [torch.cat([identity[None, :, None, :], first], dim=1), last]
            if self.grouped == "in":
                return [first, torch.cat([identity[:, None, :, None], last], dim=2)]
            return [first, torch.cat([identity[:, :, None, None], last], dim=1)]
        if scalars is None:
            return stored
        scalars = scalars.to(wide(scalars.dtype))
        if stored[0].numel() <= stored[1].numel():
            return [stored[0] * scalars, stored[1]]
        return [stored[0], scalars.reshape(-1, 1, 1, 1) * stored[1]]

    def core_std(self, std: float) -> float:
        """Standard deviation σ of the entries of every core for which entries of W have standard deviation ``std``.

        An entry is the sum, over the ``Π r`` paths through the bonds, of a product of L independent core entries of
        mean 0 and variance σ². Two paths differ in at least one factor, so their products are uncorrelated and
        variances add: ``std² = σ^(2L) · Π r``, whence ``σ = (std² / Π r)^(1/2L)``, for any number of sites and bonds of
        any sizes. Entries of a row are uncorrelated too, so ``in`` of them times inputs of mean square q give outputs
        of variance ``in · std² · q``, as a dense layer does: std² = 1/(3·in) is that of a new ``nn.Linear``.

        The MPO paper (arXiv 2603.28534) draws with ``σ = in^(-1/4) · χ^(-(L-1)/2L)``, that is ``std² = in^(-L/2)``. For
        two sites that is 1/in: right but for a constant, three times the variance of a new ``nn.Linear``. For three
        sites it is ``in^½`` times less again (11 at 128 inputs, 23 at 512), and so on with every further site. And
        where a cut is too small to have the bond χ, ``χ^(L-1)`` counts more paths than there are.
        """
        return (std**2 / math.prod(self.ranks)) ** (1 / (2 * self.sites))

    def initial_stds(self, std: float) -> tuple[float, ...]:
        """Standard deviations of random stored cores for which entries of W have standard deviation about ``std``.

        Without pivots they are :meth:`core_std`; with pivots one core holds rows of W itself, the other mixes them.
        """
        own = self.core_std(std)
        if not self.pivoted:
            return (own,) * self.sites
        mixing = self.ranks[0] ** -0.5
        if self.has_pivot_rows:
            return mixing, std
        if self.grouped == "out":
            return std, mixing
        _, (_, _, others, _) = self.stored_shapes  # as many inputs are themselves as are mixed of all the others
        return std * (self.in_modes[1] / (2 * self.ranks[0])) ** 0.5, others**-0.5
