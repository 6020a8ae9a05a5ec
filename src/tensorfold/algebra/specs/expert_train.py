"""All experts of a layer in one tensor train, whose middle mode is the number of the expert.

Notation:
    W_e     matrix of expert e, (m, n); all of them one below the other are the structure's matrix, (E·m, n)
    U       basis of the outputs that all experts share, (m, p)
    S       a core for each expert, (E, p, q)
    V       basis of the inputs that all experts share, (q, n)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import SpecError


@dataclass(frozen=True)
class ExpertTrain(Structure):
    """``W_e = U S_e V``: a tensor train with modes (outputs, experts, inputs), or Tucker-2 of the tensor (E, m, n).

    Where a bond is as large as its mode, the basis at that end is the identity and not stored.

    Args:
        experts: E.
        expert_rows: Outputs m of each expert.
        in_features: Inputs n of each expert.
        out_rank: Bond p between outputs and experts, at most m.
        in_rank: Bond q between experts and inputs, at most n.

    Raises:
        SpecError: A size is not positive, or a bond larger than its mode.
    """

    kind: ClassVar[str] = "expert-train"

    experts: int
    expert_rows: int
    in_features: int
    out_rank: int
    in_rank: int

    def __post_init__(self) -> None:
        sizes = self.experts, self.expert_rows, self.in_features, self.out_rank, self.in_rank
        if not all(type(size) is int and size > 0 for size in sizes):
            raise SpecError(f"ExpertTrain: got sizes {sizes}; needed positive integers.")
        if self.out_rank > self.expert_rows or self.in_rank > self.in_features:
            raise SpecError(
                f"ExpertTrain: got bonds {self.out_rank} and {self.in_rank}; needed at most {self.expert_rows} and "
                f"{self.in_features}, the numbers of outputs and inputs."
            )

    @property
    def out_features(self) -> int:
        return self.experts * self.expert_rows

    @property
    def has_out_basis(self) -> bool:
        """Whether U is stored."""
        return self.out_rank < self.expert_rows

    @property
    def has_in_basis(self) -> bool:
        """Whether V is stored."""
        return self.in_rank < self.in_features

    @property
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        left = ((self.expert_rows, self.out_rank),) if self.has_out_basis else ()
        right = ((self.in_rank, self.in_features),) if self.has_in_basis else ()
        return (*left, (self.experts, self.out_rank, self.in_rank), *right)

    @property
    def macs(self) -> int:
        """Multiply–adds of all experts, each with the bases: a token that k of them are sent takes k / E of it."""
        each = self.out_rank * self.in_rank
        each += self.expert_rows * self.out_rank if self.has_out_basis else 0
        each += self.in_rank * self.in_features if self.has_in_basis else 0
        return self.experts * each

    def parts(self, cores: Sequence[Tensor]) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """U, S and V among the cores; None for a basis that is not stored."""
        left = cores[0] if self.has_out_basis else None
        return left, cores[int(self.has_out_basis)], cores[-1] if self.has_in_basis else None

    def apply(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        return self.products(x, cores).flatten(-2)

    def products(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """``x W_eᵀ`` of every expert, shape (..., n) → (..., E, m)."""
        left, middle, right = self.parts(cores)
        x = x if right is None else x @ right.mT  # (..., q)
        y = (x[..., None, None, :] @ middle.mT).squeeze(-2)  # (..., E, p)
        return y if left is None else y @ left.mT

    def product(self, expert: int, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """``x W_eᵀ`` of one expert, shape (..., n) → (..., m)."""
        left, middle, right = self.parts(cores)
        x = x if right is None else x @ right.mT
        y = x @ middle[expert].mT
        return y if left is None else y @ left.mT

    def initial_stds(self, std: float) -> tuple[float, ...]:
        """σ of all cores: an entry is a sum over the stored bonds of products of one number of every core."""
        bonds = (self.out_rank if self.has_out_basis else 1) * (self.in_rank if self.has_in_basis else 1)
        count = len(self.core_shapes)
        return ((std**2 / bonds) ** (1 / (2 * count)),) * count

    @property
    def attainable_matrix_rank(self) -> int:
        return min(self.out_features, self.experts * self.out_rank, self.in_rank)

    @property
    def is_low_rank(self) -> bool:
        return True

    @property
    def largest_ranks(self) -> tuple[int, ...]:
        return self.expert_rows, self.in_features

    def modes_and_ranks(self) -> dict[str, list[int]]:
        return {
            "out_modes": [self.expert_rows, self.experts, 1],
            "in_modes": [1, 1, self.in_features],
            "ranks": [self.out_rank, self.in_rank],
        }

    def __str__(self) -> str:
        left = f"{self.expert_rows}×{self.out_rank} · " if self.has_out_basis else ""
        right = f" · {self.in_rank}×{self.in_features}" if self.has_in_basis else ""
        return f"{left}{self.experts}×({self.out_rank}×{self.in_rank}){right}"
