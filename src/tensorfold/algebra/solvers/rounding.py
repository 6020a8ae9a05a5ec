"""Factors of a product rounded to few bits together, so that the product keeps what each alone would lose.

Rounded one by one, an error of the inner factor reaches every output through the outer one: pivots make up all other
rows with coefficients that cancel each other, and in eight bits lose two to six times what a dense matrix does. Here
each number that is rounded moves those that are not yet, which make up for it as far as the other factor lets them:
optimal brain quantisation in a fixed order (GPTQ: Frantar et al., arXiv 2210.17323), with the other factor as its data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK = 64  # rows that are rounded before what they leave over goes to all others
_DAMPING = 1e-4  # of the mean of a metric's diagonal


@dataclass(frozen=True)
class Grid:
    """The numbers that a row of a stored matrix may hold: whole multiples of a step, which its largest number sets.

    Attributes:
        largest: How many steps the largest number is from 0.
        signed: Whether the other sign has a step less, as whole numbers in two's complement have.
        group: How many neighbours along a row share a step; all of it if None.
    """

    largest: int
    signed: bool = False
    group: int | None = None

    def of(self, matrix: Tensor) -> _Steps:
        """Steps for the rows of a matrix (m, n)."""
        rows, columns = matrix.shape
        size = self.group or columns
        groups = F.pad(matrix, (0, -columns % size)).reshape(rows, -1, size)
        places = groups.abs().argmax(-1, keepdim=True)  # of the numbers that set a step
        peaks = groups.gather(-1, places)
        step = torch.where(peaks == 0, torch.ones_like(peaks), peaks.abs() / self.largest)
        anchors = torch.zeros_like(groups).scatter(-1, places, peaks.sign())
        other = self.largest - self.signed
        low, high = (torch.where(peaks * sign > 0, self.largest, other) for sign in (-1, 1))

        def flat(values: Tensor) -> Tensor:
            return values.expand_as(groups).reshape(rows, -1)[:, :columns]

        return _Steps(flat(step), -flat(low), flat(high), flat(anchors) * self.largest)


@dataclass(frozen=True)
class _Steps:
    """Step, least and greatest whole number, and those that are given (0: none) of every number of a matrix (m, n)."""

    step: Tensor
    low: Tensor
    high: Tensor
    given: Tensor

    def row(self, index: int, values: Tensor) -> Tensor:
        """A row of values (n,) rounded; what sets a step stays, or whoever stores them would find another one."""
        whole = (values / self.step[index]).round().clamp(self.low[index], self.high[index])
        return torch.where(self.given[index] != 0, self.given[index], whole) * self.step[index]

    def turned(self) -> _Steps:
        """Of the transposed matrix."""
        return _Steps(*(each.T.contiguous() for each in (self.step, self.low, self.high, self.given)))

    def ordered(self, order: Tensor) -> _Steps:
        """Of the matrix with its rows in another order."""
        return _Steps(*(each[order] for each in (self.step, self.low, self.high, self.given)))


def rounded_factors(left: Tensor, right: Tensor, pivots: bool, grid: Grid) -> tuple[Tensor, Tensor]:
    """Factors L (m, r) and R (r, n) on the grid, whose product, below R itself where rows are pivots, stays near L R.

    R is rounded first, in the metric ``Lᵀ L`` (``+ I`` with pivots) of its rows; L is fitted to what became of R, and
    rounded in the metric ``R Rᵀ`` of its columns.

    Args:
        left: L, floating.
        right: R.
        pivots: Whether the matrix is ``[R; L R]``, and not ``L R``.
        grid: Of both, with a step for a row, or for a group of its numbers.

    Returns:
        The two in their dtypes. Rounding them again, each by itself, changes nothing but the last bit.
    """
    outer, inner = left.detach().double(), right.detach().double()
    metric = outer.T @ outer
    if pivots:
        metric.diagonal().add_(1)
    near = _in_turn(inner, metric, grid.of(inner))
    gram = near @ near.T
    fitted = outer + torch.linalg.solve(_damped(gram), near @ (outer @ (inner - near)).T).T
    outer = _in_turn(fitted.T.contiguous(), gram, grid.of(fitted).turned()).T
    return outer.to(left).contiguous(), near.to(right).contiguous()


def _in_turn(matrix: Tensor, metric: Tensor, steps: _Steps) -> Tensor:
    """Rows of M (r, n) rounded one after another, the rest moved so that ``tr(E Eᵀ H)`` of the error E stays small.

    Args:
        matrix: M, fp64.
        metric: H (r, r), fp64, positive semidefinite.
        steps: Of M.
    """
    count = len(matrix)
    order = metric.diagonal().argsort(descending=True)  # what weighs most has most others to make up for it
    upper = torch.linalg.cholesky(torch.linalg.inv(_damped(metric[order][:, order])), upper=True)
    rest, steps, done = matrix[order], steps.ordered(order), torch.empty_like(matrix)
    for first in range(0, count, _BLOCK):
        last = min(first + _BLOCK, count)
        lost = torch.empty(last - first, matrix.shape[1]).to(matrix)
        for index in range(first, last):
            done[index] = steps.row(index, rest[index])
            lost[index - first] = (rest[index] - done[index]) / upper[index, index]
            rest[index:last] -= upper[index, index:last, None] * lost[index - first]
        rest[last:] -= upper[first:last, last:].T @ lost
    return torch.empty_like(done).index_copy(0, order, done)


def _damped(metric: Tensor) -> Tensor:
    """A metric with a small multiple of the identity added, so that it is definite; the identity for zero."""
    mean = metric.diagonal().mean()
    return metric + (_DAMPING * mean if mean > 0 else 1.0) * torch.eye(len(metric)).to(metric)
