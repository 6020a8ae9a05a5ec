"""Shape of an embedding table with one matrix product state (MPS) a token.

Notation and fit: :mod:`tensorfold.algebra.solvers.token_mps`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorfold.algebra.precision import wide
from tensorfold.algebra.specs.structure import Structure
from tensorfold.errors import SpecError

CHUNK = 2**22  # most numbers of the table that are made at a time


@dataclass(frozen=True)
class TokenMPSSpec(Structure):
    """Shape of a table in which every row is an MPS of its own; holds no weights.

    Args:
        vocabulary: Rows of the table.
        width: Columns of the table.
        modes: Mode of each site, in this order; their product is the padded width.
        rank: Cap on every bond; a bond is what its cut can have, where that is less.

    Raises:
        SpecError: Modes and width do not fit together, or no bond can be as large as ``rank``.

    >>> spec = TokenMPSSpec(vocabulary=50257, width=768, modes=(2,) * 10, rank=4)
    >>> spec.ranks, spec.parameters_per_token, round(spec.factor, 2)
    ((2, 4, 4, 4, 4, 4, 4, 4, 2), 232, 3.31)
    """

    vocabulary: int
    width: int
    modes: tuple[int, ...]
    rank: int

    kind: ClassVar[str] = "token-mps"
    tables_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "modes", tuple(self.modes))
        except TypeError:
            raise SpecError(f"TokenMPSSpec: modes={self.modes!r}; needed a sequence of positive integers.") from None
        for name, values in (
            ("vocabulary", (self.vocabulary,)),
            ("width", (self.width,)),
            ("modes", self.modes),
            ("rank", (self.rank,)),
        ):
            if not values or not all(type(value) is int and value > 0 for value in values):
                raise SpecError(f"TokenMPSSpec: {name}={getattr(self, name)!r}; needed positive integers.")
        if self.padded_width < self.width:
            raise SpecError(
                f"TokenMPSSpec: width={self.width} does not fit modes {self.modes}, whose product is "
                f"{self.padded_width}; give modes whose product is at least {self.width}."
            )
        if self.rank > self.largest_rank:
            raise SpecError(
                f"TokenMPSSpec: rank={self.rank} is more than any bond of modes {self.modes} can have; the largest "
                f"attainable is {self.largest_rank}, which is exact."
            )

    @classmethod
    def within(cls, vocabulary: int, width: int, modes: Sequence[int], keep: float) -> TokenMPSSpec:
        """Shape of the largest rank whose table has at most a fraction of the dense one's parameters.

        Args:
            vocabulary: Rows of the table.
            width: Columns of the table.
            modes: Mode of each site.
            keep: The fraction.

        Raises:
            SpecError: Not even rank 1 has so few; the message names what it reaches.
        """
        best = smallest = cls(vocabulary, width, tuple(modes), 1)
        most = keep * width
        if smallest.parameters_per_token > most:
            raise SpecError(
                f"TokenMPSSpec: keep={keep} leaves {math.floor(most)} of {width} numbers a token, but rank 1 with "
                f"modes {smallest.modes} already takes {smallest.parameters_per_token}; keep at least "
                f"{math.ceil(1e4 / smallest.factor) / 1e4:.4f}, or give more and smaller modes."
            )
        for rank in range(2, smallest.largest_rank + 1):
            larger = replace(smallest, rank=rank)
            if larger.parameters_per_token > most:
                break
            best = larger
        return best

    @property
    def out_features(self) -> int:
        return self.vocabulary

    @property
    def in_features(self) -> int:
        return self.width

    @property
    def sites(self) -> int:
        return len(self.modes)

    @property
    def padded_width(self) -> int:
        return math.prod(self.modes)

    @cached_property
    def _cuts(self) -> tuple[int, ...]:
        """Largest rank of each interior cut: the product of the modes on its smaller side."""
        left = list(itertools.accumulate(self.modes, lambda a, b: a * b))[:-1]
        return tuple(min(size, self.padded_width // size) for size in left)

    @property
    def largest_rank(self) -> int:
        return max(self._cuts, default=1)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Interior bonds of every token: ``min(rank, product of modes to the left, product to the right)``."""
        return tuple(min(self.rank, cut) for cut in self._cuts)

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape (vocabulary, left bond, mode, right bond) of every core."""
        bonds = (1, *self.ranks, 1)
        return tuple((self.vocabulary, bonds[k], mode, bonds[k + 1]) for k, mode in enumerate(self.modes))

    @property
    def parameters_per_token(self) -> int:
        return sum(left * mode * right for _, left, mode, right in self.core_shapes)

    @property
    def factor(self) -> float:
        """Numbers of the dense table over numbers stored."""
        return self.width / self.parameters_per_token

    @cached_property
    def split(self) -> int:
        """Number of sites multiplied up from the left, the others from the right, before the two halves are joined."""
        return min(range(1, max(2, self.sites)), key=self._row_macs)

    def _row_macs(self, split: int) -> int:
        """Multiply–adds of one row, with the two halves joined after ``split`` sites."""
        if self.sites == 1:
            return 0
        bonds, modes = (1, *self.ranks, 1), self.modes
        left = sum(math.prod(modes[: k + 1]) * bonds[k] * bonds[k + 1] for k in range(1, split))
        right = sum(math.prod(modes[k:]) * bonds[k] * bonds[k + 1] for k in range(split, self.sites - 1))
        return left + right + self.padded_width * bonds[split]

    @property
    def row_macs(self) -> int:
        """Multiply–adds of looking up one token."""
        return self._row_macs(self.split)

    @property
    def macs(self) -> int:
        """Multiply–adds of the tied head for one hidden state: every row is rebuilt and read.

        Rows are rebuilt once for all hidden states of a call, so a longer input shares that part.
        """
        return self.vocabulary * (self.row_macs + self.width)

    @property
    def padded_parameters(self) -> int:
        return self.vocabulary * self.padded_width

    @property
    def largest_ranks(self) -> tuple[int, ...]:
        return self._cuts

    def modes_and_ranks(self) -> dict[str, list[int]]:
        """Shape as plans and reports write it; the token index, which every site reads whole, is one out mode."""
        return {"out_modes": [self.vocabulary], "in_modes": list(self.modes), "ranks": list(self.ranks)}

    def of_rows(self, rows: int) -> Self:
        """Shape of a table with this many tokens."""
        return replace(self, vocabulary=rows)

    def initial_stds(self, std: float) -> tuple[float, ...]:
        """Standard deviations ``(std² / Π r)^(1/2N)`` of N random cores for which entries of E have ``std``."""
        return ((std**2 / math.prod(self.ranks)) ** (1 / (2 * self.sites)),) * self.sites

    def chunks(self, tokens: int, most: int) -> list[tuple[int, int]]:
        """Ranges of tokens whose rows, padded, hold at most ``most`` numbers."""
        size = max(1, most // self.padded_width)
        return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]

    @property
    def reads_slices(self) -> bool:
        return True

    def of_slices(self, slices: Sequence[Tensor]) -> Tensor:
        """Rows (tokens, width) of E from slices (tokens, left bond, mode, right bond) of the cores, in their dtype."""
        dtype = slices[0].dtype
        return rows([each.to(wide(dtype)) for each in slices], self.split)[:, : self.width].to(dtype)

    def rows(self, index: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """Rows of E, shape (tokens,) → (tokens, width); only the slices of these tokens are read."""
        return self.of_slices([core.index_select(0, index) for core in cores])

    def dense(self, cores: Sequence[Tensor]) -> Tensor:
        """E, shape (vocabulary, width), made a chunk at a time."""
        parts = self.chunks(len(cores[0]), CHUNK)
        return torch.cat([self.of_slices([core[a:b] for core in cores]) for a, b in parts])

    def apply(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """``x Eᵀ``, shape (..., width) → (..., vocabulary), a chunk of the table at a time."""
        parts = self.chunks(len(cores[0]), CHUNK)
        return torch.cat([F.linear(x, self.of_slices([core[a:b] for core in cores])) for a, b in parts], dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in a checkpoint's configuration."""
        return {"vocabulary": self.vocabulary, "width": self.width, "modes": list(self.modes), "rank": self.rank}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TokenMPSSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            SpecError: A key is missing or unknown, or the values do not fit together.
        """
        known = {"vocabulary", "width", "modes", "rank"}
        if not isinstance(data, dict) or data.keys() != known:
            raise SpecError(f"TokenMPSSpec: got {data!r}; needed {', '.join(sorted(known))} and nothing else.")
        return cls(**data)

    def __str__(self) -> str:
        runs = [(mode, len(list(run))) for mode, run in itertools.groupby(self.modes)]
        modes = "·".join(f"{mode}^{count}" if count > 1 else str(mode) for mode, count in runs)
        return f"{self.vocabulary} × MPS({modes}, rank {self.rank})"


def rows(cores: Sequence[Tensor], split: int) -> Tensor:
    """Rows, with their padding, from tokens' slices of the cores.

    Args:
        cores: One tensor a site, shapes (tokens, left bond, mode, right bond).
        split: Number of sites multiplied up from the left, the others from the right, so that no long vector is
            carried through many bonds.

    Returns:
        Shape (tokens, product of the modes).
    """
    tokens = cores[0].shape[0]
    left = cores[0].flatten(1, 2)  # (tokens, J, r)
    for core in cores[1:split]:
        _, r, m, s = core.shape
        left = (left @ core.reshape(tokens, r, m * s)).reshape(tokens, left.shape[1] * m, s)
    if len(cores) == 1:
        return left.squeeze(2)
    right = cores[-1].squeeze(3)  # (tokens, r, K)
    for core in reversed(cores[split:-1]):
        _, r, m, s = core.shape
        right = (core.reshape(tokens, r * m, s) @ right).reshape(tokens, r, m * right.shape[2])
    return (left @ right).flatten(1)
