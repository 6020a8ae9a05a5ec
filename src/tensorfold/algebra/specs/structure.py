"""The protocol of every structure: the shape of a structured matrix, and what is computed with its cores.

Notation:
    W           matrix that the cores stand for, (m, n)
    m           out_features; the vocabulary of a table
    n           in_features; the width of a table
    (...)       any leading axes

A structure holds no weights. A module of :mod:`tensorfold.nn` holds its *cores*, tensors of the shapes in
``core_shapes``, and asks the structure what they stand for. Subclass :class:`Structure` as a frozen dataclass, and the
matrices that have it fold, heal, save, load and export as every other: ``examples/own_structure.py`` is one in whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from tensorfold.algebra.orders.stored_orders import order_bytes
from tensorfold.errors import SpecError

STRUCTURES: dict[str, type[Structure]] = {}


class Structure(ABC):
    """Shape of a structured matrix.

    A subclass is a frozen dataclass with a ``kind``, and with ``out_features`` and ``in_features`` among its fields or
    properties; its fields must hold JSON values. It has to say what shapes its cores have and how they are applied to
    vectors; everything else follows from these, and is overridden where there is a faster way.

    Attributes:
        kind: Name in saved configurations, by which what was folded finds its structure again; needed to fold.
        tables_only: Whether the structure is for embedding tables (and heads tied to them) alone, not linear layers.
        shared_axes: Number of leading axes of a core; in int8, all numbers behind them share a scale.
        reordered: Sides, ``"out"`` and ``"in"``, whose index order is stored beside the cores. :meth:`apply`,
            :meth:`dense` and :meth:`rows` compute with ``W[out_order][:, in_order]``; a module takes vectors into
            these orders and back.
    """

    kind: ClassVar[str] = ""
    tables_only: ClassVar[bool] = False
    shared_axes: ClassVar[int] = 1

    reordered: tuple[str, ...] = ()

    if TYPE_CHECKING:

        @property
        def out_features(self) -> int:
            """Rows m."""

        @property
        def in_features(self) -> int:
            """Columns n."""

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("kind"):
            STRUCTURES[cls.kind] = cls

    @property
    @abstractmethod
    def core_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every core, as :meth:`apply` takes them."""

    @abstractmethod
    def apply(self, x: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """``x Wᵀ`` without building W: shape (..., n) → (..., m), sides in their stored order."""

    def dense(self, cores: Sequence[Tensor]) -> Tensor:
        """W, shape (m, n), sides in their stored order, in the dtype of the cores."""
        return self.apply(torch.eye(self.in_features, dtype=cores[0].dtype, device=cores[0].device), cores).mT

    def rows(self, index: Tensor, cores: Sequence[Tensor]) -> Tensor:
        """Rows of W, shape (tokens,) → (tokens, n); a structure of large tables reads only what these rows need."""
        return self.dense(cores)[index]

    @property
    def stored_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the stored parts of the cores; :meth:`complete` adds what is not stored."""
        return self.core_shapes

    @property
    def scalar_count(self) -> int:
        """Number of scalars stored beside the cores, one for every bond index (Krony-PT)."""
        return 0

    def complete(self, stored: list[Tensor], scalars: Tensor | None = None) -> list[Tensor]:
        """Cores of shapes ``core_shapes`` from their stored parts, shapes ``stored_shapes``, and scalars, if any."""
        return stored

    def initial_stds(self, std: float) -> tuple[float, ...]:
        """Standard deviations of random stored cores for which entries of W have standard deviation about ``std``."""
        count = len(self.stored_shapes)
        return (std ** (1 / count),) * count

    @property
    def kept_sizes(self) -> tuple[int, int]:
        """Numbers of rows and columns that can differ from zero: (m, n), unless the structure leaves some out."""
        return self.out_features, self.in_features

    @property
    def parameters(self) -> int:
        """Number of trainable numbers stored, padding and scalars included; orders are counted in ``order_bytes``."""
        return sum(math.prod(shape) for shape in self.stored_shapes) + self.scalar_count

    @property
    def dense_parameters(self) -> int:
        """Numbers of the dense matrix, m · n."""
        return self.out_features * self.in_features

    @property
    def padded_parameters(self) -> int:
        """Numbers of the largest dense matrix that multiplying out makes; more than m · n where modes are padded."""
        return self.dense_parameters

    @property
    def macs(self) -> int:
        """Multiply–adds a token of a linear layer or tied head; every stored number is used once, unless overridden."""
        return self.parameters

    @property
    def row_macs(self) -> int:
        """Multiply–adds of looking up one row; :attr:`macs`, unless overridden."""
        return self.macs

    @property
    def order_bytes(self) -> int:
        """Bytes of the stored orders of ``reordered`` sides: an index for every output, and for every input read."""
        rows = order_bytes(self.out_features, self.out_features) if "out" in self.reordered else 0
        return rows + (order_bytes(self.kept_sizes[1], self.in_features) if "in" in self.reordered else 0)

    @property
    def attainable_matrix_rank(self) -> int:
        """Upper bound on the rank of W."""
        return min(self.out_features, self.in_features)

    @property
    def is_low_rank(self) -> bool:
        """Whether the structure saves numbers by a small rank of W, which is then nothing to warn of."""
        return False

    @property
    def is_chain(self) -> bool:
        """Whether the cores are one chain (left bond, out mode, in mode, right bond), whose bonds have spectra."""
        return False

    @property
    def largest_ranks(self) -> tuple[int, ...]:
        """Largest value that each rank or bond could have."""
        return ()

    def modes_and_ranks(self) -> dict[str, list[int]]:
        """Shape as plans and reports write it: lists of numbers ``out_modes``, ``in_modes``, ``ranks``."""
        return {"out_modes": [self.out_features], "in_modes": [self.in_features], "ranks": []}

    @property
    def reads_slices(self) -> bool:
        """Whether a row follows from its own slice of every core, by :meth:`of_slices`."""
        return False

    def of_slices(self, slices: Sequence[Tensor]) -> Tensor:
        """Rows of W from their slices of every core, shape (tokens, n); where ``reads_slices``.

        Args:
            slices: One tensor a core, its first axis the tokens.

        Raises:
            SpecError: Rows of this structure need more than a slice of every core.
        """
        raise SpecError(f"{type(self).__name__}: a row needs more than a slice of every core.")

    @property
    def transposed(self) -> Structure:
        """Structure of Wᵀ.

        Raises:
            SpecError: Wᵀ has no structure of this kind.
        """
        raise SpecError(f"{type(self).__name__}: the transposed matrix has no structure of this kind.")

    def of_rows(self, rows: int) -> Self:
        """Structure of a table with this many of the rows, where every row is fitted by itself (``Method.rowwise``).

        Raises:
            SpecError: Rows of this structure share cores.
        """
        raise SpecError(f"{type(self).__name__}: its rows share cores, so a part of them has no structure of its own.")

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as stored in a checkpoint's configuration."""
        return {"kind": self.kind, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            SpecError: A key is missing or unknown, or the values do not fit together.
        """
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in data.items() if key != "kind"}
        try:
            return cls(**values)
        except TypeError as error:
            raise SpecError(f"{cls.__name__}: got {data!r}, which are not its fields ({error}).") from None

    def __str__(self) -> str:
        return f"{self.kind} {self.out_features}×{self.in_features}"
