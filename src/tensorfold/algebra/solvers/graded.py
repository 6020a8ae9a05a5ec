"""Graded low rank: a table whose rows share one basis, and of which frequent tokens use more than rare ones.

    E[order] ≈ [ X ; U_2 B[:r_2] ; … ; U_C B[:r_C] ]        X: the most frequent rows as they are, B: (basis, width)

Rows are sorted by how often they are used and cut into classes. A class of n tokens has n × r coefficients, which read
the first r rows of the basis B, so B serves the common directions first. Low rank is the case of one class, and
"frequent tokens exact, the rest of low rank" (as in GroupReduce, arXiv 1806.06950, and adaptive inputs, arXiv
1809.10853, where nothing is shared) that of two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from tensorfold.algebra.orders.stored_orders import order_bytes
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.errors import SpecError
from tensorfold.utils.validation import check_floating

_CHUNK = 2**21  # elements worked on at a time in fp64
_FLOOR = 1e-9  # of the metric's largest eigenvalue: directions below it are as good as never read
_SMALLEST_CLASS = 32  # tokens
# Of the width; frequent tokens' ranks above it are raised to the width, since a basis of nearly all directions costs
# more than it saves.
_EXACT = 0.75


@dataclass(frozen=True)
class GradedSpec:
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

    # What other specs may have and this one never has, or keeps to itself.
    scalars: ClassVar[bool] = False
    reordered: ClassVar[tuple[str, ...]] = ()
    is_low_rank: ClassVar[bool] = True

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
        """Classes whose ranks fall with a power of the place in the order: ``rank ∝ place^(−slope)``.

        Where the n-th token is used as often as Zipf's law says and the k-th direction matters as a power of k, equal
        gain for every parameter (reverse water-filling) gives such a law. Classes are octaves: the last holds half of
        the vocabulary, the one before it a quarter, and so on.

        Args:
            keep: Fraction of the dense parameters that stays at most.
            slope: 0 is low rank.

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
    def order_bytes(self) -> int:
        """Bytes of the stored order of the tokens, a number for each."""
        return order_bytes(self.vocabulary, self.vocabulary)

    @property
    def out_features(self) -> int:
        return self.vocabulary

    @property
    def in_features(self) -> int:
        return self.width

    @property
    def out_modes(self) -> tuple[int, ...]:
        """Tokens of each class."""
        return tuple(tokens for tokens, _ in self.classes)

    @property
    def in_modes(self) -> tuple[int, ...]:
        return (self.width,)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each class."""
        return tuple(rank for _, rank in self.classes)

    @property
    def starts(self) -> tuple[int, ...]:
        """Place of the first token of each class."""
        return tuple(itertools.accumulate(self.out_modes, initial=0))[:-1]

    @property
    def basis(self) -> int:
        """Rows of the basis: the largest rank below the width; 0 if all rows are kept as they are."""
        below = [rank for rank in self.ranks if rank < self.width]
        return below[0] if below else 0

    @cached_property
    def core_shapes(self) -> tuple[tuple[int, int], ...]:
        """(tokens, rank) of every class, then (basis, width)."""
        return (*self.classes, (self.basis, self.width)) if self.basis else self.classes

    @property
    def parameters(self) -> int:
        """Trainable numbers; the order, one integer a token, is not among them."""
        return sum(rows * columns for rows, columns in self.core_shapes)

    @property
    def dense_parameters(self) -> int:
        return self.vocabulary * self.width

    @property
    def factor(self) -> float:
        """How many times fewer numbers are stored than in the dense table."""
        return self.dense_parameters / self.parameters

    @property
    def attainable_matrix_rank(self) -> int:
        exact = self.classes[0][0] if self.ranks[0] == self.width else 0
        return min(self.vocabulary, self.width, exact + self.basis)

    @property
    def macs(self) -> int:
        """Multiply–adds of the tied head for one hidden state: every stored number is used once."""
        return self.parameters

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
    """Borders of the classes, from 0 to the vocabulary."""
    borders = [vocabulary]
    while borders[-1] >= 2 * _SMALLEST_CLASS:
        borders.append(borders[-1] // 2)
    return [0, *reversed(borders)]


def graded_low_rank(
    table: Tensor,
    spec: GradedSpec,
    importance: Tensor | None = None,
    metric: Tensor | None = None,
    sweeps: int = 30,
) -> Factors:
    """The table nearest to ``table`` in the error ``Σ_t w_t ‖(e_t − ê_t) C^½‖²``, rows sorted by ``w``.

    In the metric, and for an orthonormal basis V, a row's best coefficients are its products with V, and what a class
    keeps is ``tr(V_rᵀ S V_r)`` with S the weighted second moment of its rows. The sum over classes is convex in V, so
    the polar factor of its gradient is never worse than V: each sweep takes it. With one class, the start (leading
    eigenvectors of all S) is the optimum: weighted PCA.

    Args:
        table: Shape (vocabulary, width), any floating dtype.
        importance: w, shape (vocabulary,), positive: the order of the rows and the weight of their errors; equal if
            None.
        metric: C, shape (width, width), symmetric and positive semidefinite; the identity if None.
        sweeps: At most this many; fewer where they gain nothing any more.

    Returns:
        Cores of shapes ``spec.core_shapes``, fp32 or ``table``'s dtype if that is fp64; ``out_order``: token index at
        each place.

    Raises:
        SpecError: A shape does not fit, or a value is not finite or has the wrong sign.
    """
    weights = _check(table, spec, importance, metric)
    result = table.dtype if table.dtype in (torch.float32, torch.float64) else torch.float32
    order = weights.argsort(descending=True, stable=True)
    into, back = _roots(metric, spec.width, table.device)
    places = list(zip(spec.starts, spec.classes, strict=True))
    members = [order[start : start + tokens] for start, (tokens, _) in places]
    graded = [(rows, rank) for rows, (_, rank) in zip(members, spec.classes, strict=True) if rank < spec.width]
    if not graded:
        return Factors([table[order].to(result)], out_order=order)
    moments = [_moment(table, rows, weights, into) for rows, _ in graded]
    basis = _basis(moments, [rank for _, rank in graded], sweeps)
    project, rebuild = into @ basis, basis.mT @ back  # (width, r), (r, width)
    coefficients = [table[rows].double() @ project[:, :rank] for rows, rank in graded]
    scale = _evening(coefficients, rebuild)
    exact = [table[rows].double() for rows, (_, rank) in zip(members, spec.classes, strict=True) if rank == spec.width]
    cores = [*exact, *(part * scale[: part.shape[1]] for part in coefficients), rebuild / scale[:, None]]
    return Factors([core.to(result) for core in cores], out_order=order)


def _check(table: Tensor, spec: GradedSpec, importance: Tensor | None, metric: Tensor | None) -> Tensor:
    """The weights in fp64, of mean 1."""
    needed = {"table": (spec.vocabulary, spec.width), "importance": (spec.vocabulary,), "metric": (spec.width,) * 2}
    for name, given in {"table": table, "importance": importance, "metric": metric}.items():
        if given is None:
            continue
        if tuple(given.shape) != needed[name]:
            raise SpecError(f"{name} of shape {tuple(given.shape)}; the spec needs {needed[name]}.")
        if name == "table":
            check_floating(table=given)
        if not torch.isfinite(given).all():
            raise SpecError(f"{name} holds NaN or infinity; repair the checkpoint, or exclude this module.")
    if importance is None:
        return torch.ones(spec.vocabulary, dtype=torch.float64, device=table.device)
    if not (importance > 0).all():
        raise SpecError("importance holds numbers that are not positive; every token needs some, seen or not.")
    weights = importance.to(table.device).double()
    return weights / weights.mean()


def _roots(metric: Tensor | None, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``C^½`` and its inverse, (width, width); directions that C does not know are given a trace of weight."""
    if metric is None:
        identity = torch.eye(width, dtype=torch.float64, device=device)
        return identity, identity
    values, vectors = torch.linalg.eigh(metric.to(device).double())
    roots = values.clamp_min(max(float(values[-1]) * _FLOOR, torch.finfo(torch.float64).tiny)).sqrt()
    return (vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT


def _moment(table: Tensor, rows: Tensor, weights: Tensor, into: Tensor) -> Tensor:
    """``Σ w_t y_t y_tᵀ`` of some rows ``y = e C^½``, shape (width, width)."""
    total = torch.zeros_like(into)
    for some in rows.split(max(1, _CHUNK // into.shape[0])):
        part = table[some].double()
        total += part.mT @ (part * weights[some, None])
    return into @ total @ into


def _basis(moments: Sequence[Tensor], ranks: Sequence[int], sweeps: int) -> Tensor:
    """Orthonormal columns, shape (width, largest rank), whose first r keep as much as can be of each class."""
    basis = torch.linalg.eigh(torch.stack(list(moments)).sum(0)).eigenvectors.flip(-1)[:, : max(ranks)]
    kept = -math.inf
    for _ in range(sweeps if len(ranks) > 1 else 0):
        gradient = torch.zeros_like(basis)
        for moment, rank in zip(moments, ranks, strict=True):
            gradient[:, :rank] += moment @ basis[:, :rank]
        before, kept = kept, float((gradient * basis).sum())
        if kept <= before * (1 + 1e-6):
            break
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        basis = left @ right
    return basis


def _evening(coefficients: Sequence[Tensor], basis: Tensor) -> Tensor:
    """Factor for each column of coefficients that gives it the norm of its row of the basis, shape (basis,)."""
    squares = torch.zeros(basis.shape[0], dtype=basis.dtype, device=basis.device)
    for part in coefficients:
        squares[: part.shape[1]] += part.square().sum(0)
    norms = torch.linalg.vector_norm(basis, dim=1)
    return torch.where(squares > 0, (norms / squares.sqrt()).sqrt(), torch.ones_like(norms))
