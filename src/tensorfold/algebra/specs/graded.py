"""Shape of a graded table: rows share one basis, of which frequent tokens use more than rare ones.

Notation and fit: :mod:`tensorfold.algebra.solvers.graded`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import SpecError

_SMALLEST_CLASS = 32  # tokens
# Part of the width above which a class's rank is raised to the width: a basis of nearly all directions costs more than
# it saves.
_EXACT = 0.75


@dataclass(frozen=True)
class GradedSpec(Structure):
    """Shape of a table whose classes of tokens have ranks of their own; holds no weights.

    Args:
        vocabulary: Rows of the table.
        width: Columns of the table.
        classes: (tokens, rank) of every class, most frequent tokens first, ranks falling. A rank of ``width`` keeps
            rows as they are, and needs no basis.

    Raises:
        SpecError: The classes do not make up the vocabulary, or a rank does not fit.

    >>> spec = GradedSpec(vocabulary=1000, width=64, classes=((100, 64), (900, 8)))
    >>> spec.basis, spec.parameters, round(spec.factor, 2)
    (8, 14112, 4.54)
    """

    vocabulary: int
    width: int
    classes: tuple[tuple[int, int], ...]

    kind: ClassVar[str] = "graded"
    tables_only: ClassVar[bool] = True
    reordered = ("out",)  # nothing else says which token a row is

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "classes", tuple((tokens, rank) for tokens, rank in self.classes))
        except (TypeError, ValueError):
            raise SpecError(f"GradedSpec: classes={self.classes!r}; needed pairs of (tokens, rank).") from None
        numbers = (self.vocabulary, self.width, *itertools.chain(*self.classes))
        if not self.classes or not all(type(number) is int and number > 0 for number in numbers):
            raise SpecError(
                f"GradedSpec: vocabulary={self.vocabulary!r}, width={self.width!r}, classes={self.classes!r}; needed "
                "positive integers, and at least one class."
            )
        tokens = sum(tokens for tokens, _ in self.classes)
        if tokens != self.vocabulary:
            raise SpecError(
                f"GradedSpec: the classes hold {tokens} tokens of a vocabulary of {self.vocabulary}; every token needs "
                "one class."
            )
        ranks = [rank for _, rank in self.classes]
        if ranks[0] > self.width or any(a <= b for a, b in itertools.pairwise(ranks)):
            raise SpecError(
                f"GradedSpec: ranks {ranks} on a width of {self.width}; needed ranks of at most {self.width} that "
                "fall from class to class. Put classes of equal rank together."
            )

    @classmethod
    def within(cls, vocabulary: int, width: int, keep: float, slope: float) -> GradedSpec:
        """Shape whose ranks fall with a power of a token's place in the order, ``rank ∝ place^(−slope)``.

        Where the n-th token is used as often as Zipf's law says and the k-th direction matters as a power of k, equal
        gain for every parameter (reverse water-filling) gives such a law. Classes are octaves: the last holds half of
        the vocabulary, the one before it a quarter, and so on.

        Args:
            vocabulary: Rows of the table.
            width: Columns of the table.
            keep: Fraction of the dense parameters that stays at most.
            slope: Exponent of the power law; 0 is low rank.

        Raises:
            SpecError: Not even rank 1 has as few parameters; the message names what it has.
        """
        cuts = _octaves(vocabulary) if slope else [0, vocabulary]
        middles = [math.sqrt((a + 1) * b) for a, b in itertools.pairwise(cuts)]

        def with_level(level: float) -> GradedSpec:
            wanted = [max(1.0, level * (middle / vocabulary) ** -slope) for middle in middles]
            ranks = [width if rank > _EXACT * width else int(rank) for rank in wanted[:-1]]
            ranks.append(min(width, int(wanted[-1])))
            merged: dict[int, int] = {}
            for (a, b), rank in zip(itertools.pairwise(cuts), ranks, strict=True):
                merged[rank] = merged.get(rank, 0) + b - a
            return cls(vocabulary, width, tuple((tokens, rank) for rank, tokens in merged.items()))

        budget = math.floor(keep * vocabulary * width)
        low, high = 0.0, float(width)
        if with_level(low).parameters > budget:
            least = with_level(low).parameters
            raise SpecError(
                f"GradedSpec: keep={keep} leaves {budget} of {vocabulary * width} parameters, but rank 1 already takes "
                f"{least}; keep at least {math.ceil(least / (vocabulary * width) * 1e4) / 1e4:.4f}."
            )
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if with_level(middle).parameters <= budget else (low, middle)
        return with_level(low)

    @property
    def out_features(self) -> int:
        return self.vocabulary

    @property
    def in_features(self) -> int:
        return self.width

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each class, falling."""
        return tuple(rank for _, rank in self.classes)

    @property
    def starts(self) -> tuple[int, ...]:
        """Place in the order of each class's first token."""
        return tuple(itertools.accumulate((tokens for tokens, _ in self.classes), initial=0))[:-1]

    @property
    def basis(self) -> int:
        """Rows of the basis: the largest rank below the width; 0 if all rows are kept as they are."""
        below = [rank for rank in self.ranks if rank < self.width]
        return below[0] if below else 0

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes (tokens, rank) of every class's core, then (basis, width) if there is a basis."""
        return (*self.classes, (self.basis, self.width)) if self.basis else self.classes

    @property
    def factor(self) -> float:
        """Numbers of the dense table over numbers stored."""
        return self.dense_parameters / self.parameters

    @property
    def attainable_matrix_rank(self) -> int:
        exact = self.classes[0][0] if self.ranks[0] == self.width else 0
        return min(self.vocabulary, self.width, exact + self.basis)

    @property
    def is_low_rank(self) -> bool:
        """True: a low rank of most classes is what saves numbers."""
        return True

    @property
    def largest_ranks(self) -> tuple[int, ...]:
        """Largest rank that a class can have: the width, at which it holds its rows as they are."""
        return (self.width,)

    @property
    def row_macs(self) -> int:
        """Multiply–adds of looking up one token: its coefficients, padded to the whole basis, times the basis."""
        return self.basis * self.width

    def modes_and_ranks(self) -> dict[str, list[int]]:
        """Tokens of each class, the width, and the rank of each class."""
        return {
            "out_modes": [tokens for tokens, _ in self.classes],
            "in_modes": [self.width],
            "ranks": list(self.ranks),
        }

    def initial_stds(self, std: float) -> tuple[float, ...]:
        """Standard deviations of random cores for which entries of E have standard deviation ``std``.

        Exact rows have ``std``; coefficients, which read a basis of deviation 1, have ``std / √rank``.
        """
        own = [std if rank == self.width else std / rank**0.5 for rank in self.ranks]
        return (*own, 1.0) if self.basis else tuple(own)

    def by_class(self, cores: Sequence[Tensor]) -> Iterator[tuple[int, Tensor, bool]]:
        """First place of each class in the order, its core (tokens, rank), and whether that holds exact rows."""
        for start, rank, core in zip(self.starts, self.ranks, cores, strict=False):
            yield start, core, rank == self.width

    def apply(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """``x Eᵀ``, shape (..., width) → (..., vocabulary), tokens in the order of the classes."""
        shared = F.linear(x, cores[-1]) if self.basis else x  # (..., basis)
        return torch.cat(
            [F.linear(x if exact else shared[..., : core.shape[1]], core) for _, core, exact in self.by_class(cores)],
            dim=-1,
        )

    def dense(self, cores: Sequence[Tensor]) -> Tensor:
        """E, shape (vocabulary, width), tokens in the order of the classes."""
        basis = cores[-1]
        return torch.cat([core if exact else core @ basis[: core.shape[1]] for _, core, exact in self.by_class(cores)])

    def rows(self, index: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """Rows of E by their place in the order of the classes, shape (tokens,) → (tokens, width).

        Every class is asked for every token, and gives zeros for those of others: shapes then depend on no value.
        """
        rows: Tensor | None = None
        coefficients: Tensor | None = None
        for start, core, exact in self.by_class(cores):
            tokens, rank = core.shape
            inside = (index >= start) & (index < start + tokens)
            part = core[(index - start).clamp(0, tokens - 1)] * inside[:, None]
            if exact:
                rows = part
            else:
                part = F.pad(part, (0, self.basis - rank))
                coefficients = part if coefficients is None else coefficients + part
        if coefficients is not None:
            shared = coefficients @ cores[-1]
            rows = shared if rows is None else rows + shared
        assert rows is not None
        return rows

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in a checkpoint's configuration."""
        classes = [list(each) for each in self.classes]
        return {"vocabulary": self.vocabulary, "width": self.width, "classes": classes}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GradedSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            SpecError: A key is missing or unknown, or the values do not fit together.
        """
        known = {"vocabulary", "width", "classes"}
        if not isinstance(data, dict) or data.keys() != known:
            raise SpecError(f"GradedSpec: got {data!r}; needed {', '.join(sorted(known))} and nothing else.")
        return cls(**data)

    def __str__(self) -> str:
        ranks = ", ".join(f"{tokens}:{'exact' if rank == self.width else rank}" for tokens, rank in self.classes)
        return f"Graded({ranks}) × {self.width}"


def _octaves(vocabulary: int) -> list[int]:
    """Borders of classes that each hold half of the places up to their end, from 0 to the vocabulary."""
    borders = [vocabulary]
    while borders[-1] >= 2 * _SMALLEST_CLASS:
        borders.append(borders[-1] // 2)
    return [0, *reversed(borders)]
