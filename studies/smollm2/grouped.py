"""Grouped shapes ``Ŵ = A (I_g ⊗ B)``, alone or beside low rank, fitted by exact steps in turn.

g groups of columns share a basis B (K, in / g); A has the shape (out, g K). For g = 1 it is low rank, for K = 1 one
Kronecker product ``A ⊗ b``. A has a row for every output, so the best A does not depend on G, and ``G^½ W`` can be
fitted in the metric C alone; its QR factor is as small as the smaller side. With outputs grouped, the same of Wᵀ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 12  # of conjugate gradients


def root(metric: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(1e-9 * float(values.mean())).sqrt()) @ vectors.T


@dataclass(frozen=True)
class Problem:
    """``min ‖(target − Ŵ) metric^½‖`` for Ŵ with groups of columns; ``free`` rows are stored for every column of A."""

    target: Tensor  # (p, n)
    metric: Tensor  # (n, n)
    free: int

    @classmethod
    def of(cls, w: Tensor, c: Tensor, g: Tensor, outputs_grouped: bool = False) -> Problem:
        if outputs_grouped:
            w, c, g = w.T, g, c
        target = root(g) @ w.double()
        target = torch.linalg.qr(target).R if len(target) > target.shape[1] else target
        return cls(target.float(), c.float(), len(w))

    @property
    def size(self) -> int:
        return self.free * self.target.shape[1]

    def loss(self, approximation: Tensor | float = 0.0) -> float:
        left = self.target - approximation
        return float(((left @ self.metric) * left).sum())

    def rank(self, parameters: float) -> int:
        """The largest of low rank with pivots."""
        total = self.free + self.target.shape[1]
        return min(len(self.target), max(0, math.floor((total - math.sqrt(max(0, total**2 - 4 * parameters))) / 2)))

    def terms(self, groups: int, parameters: float) -> int:
        """The most columns of A for every group; at most all."""
        width = self.target.shape[1] // groups
        slope = self.free * groups + width
        return min(width, math.floor((slope - math.sqrt(max(0, slope**2 - 4 * parameters))) / 2))


@dataclass
class Grouped:
    """``A (I_g ⊗ B)`` improved by exact steps: A by a linear solve, B by conjugate gradients; the loss never rises.

    ``labels``: which basis each group has, (g,); ``basis``: (bases, K, n / g).
    """

    problem: Problem
    labels: Tensor
    basis: Tensor

    @classmethod
    def start(cls, problem: Problem, groups: int, terms: int, rest: Tensor) -> Grouped:
        """The leading right singular vectors of the groups below one another."""
        parts = rest.reshape(len(rest), groups, -1)
        gram = torch.einsum("pgx,pgy->xy", parts, parts)
        basis = torch.linalg.eigh(gram).eigenvectors[:, -terms:].T
        return cls(problem, torch.zeros(groups, dtype=torch.int64), basis[None].contiguous())

    def expanded(self) -> Tensor:
        """``I_g ⊗ B``, (g K, n)."""
        return torch.block_diag(*self.basis[self.labels])

    def solve_left(self, rest: Tensor) -> Tensor:
        rows = self.expanded()
        weighed = rows @ self.problem.metric
        gram = weighed.double() @ rows.T.double()
        gram.diagonal().add_(1e-9 * gram.diagonal().mean())
        return torch.cholesky_solve((weighed @ rest.T).double(), torch.linalg.cholesky(gram)).T.float()  # (p, g K)

    def solve_basis(self, left: Tensor, rest: Tensor, steps: int = STEPS) -> None:
        bases, terms, width = self.basis.shape
        groups, metric = len(self.labels), self.problem.metric
        gram = (left.T @ left).reshape(groups * terms, groups, terms)
        by_group = metric.reshape(groups * width, groups, width)

        def gathered(parts: Tensor) -> Tensor:  # (g, K, n / g), summed over the groups of a basis
            return parts.new_zeros(bases, *parts.shape[1:]).index_add_(0, self.labels, parts)

        def normal(basis: Tensor) -> Tensor:
            mixed = torch.einsum("agk,gkx->agx", gram, basis[self.labels]).reshape(groups, terms, groups * width)
            return gathered(torch.einsum("gkn,ngx->gkx", mixed, by_group))

        projected = (left.T @ rest @ metric).reshape(groups, terms, groups, width)
        residual = gathered(projected[torch.arange(groups), :, torch.arange(groups)]) - normal(self.basis)
        each = torch.arange(groups)
        of_terms = gathered(gram.reshape(groups, terms, groups, terms)[each, :, each])
        of_width = gathered(metric.reshape(groups, width, groups, width)[each, :, each])
        inverses = [
            torch.linalg.inv(
                m.double() + 1e-6 * m.double().diagonal(dim1=1, dim2=2).mean() * torch.eye(m.shape[1])
            ).float()
            for m in (of_terms, of_width)
        ]
        precondition = lambda v: inverses[0] @ v @ inverses[1]  # noqa: E731
        z = precondition(residual)
        direction, slope = z, (residual * z).sum()
        for _ in range(steps):
            image = normal(direction)
            curvature = (direction * image).sum()
            if not curvature > 0:
                break
            self.basis = self.basis + slope / curvature * direction
            residual = residual - slope / curvature * image
            z = precondition(residual)
            before, slope = slope, (residual * z).sum()
            direction = z + slope / before * direction

    def improve(self, rank: int, rounds: int, low: Tensor | None = None) -> tuple[float, Tensor]:
        """The loss, and the low-rank part after so many rounds; each fits A, B and all of low rank in turn.

        A round starts from a leap along the step of the last one, and is taken back where that does not lower the loss.
        """
        low = torch.zeros_like(self.problem.target) if low is None else low
        now, stride, step = self._round(self.basis, low, rank), 1.0, None
        for _ in range(rounds - 1):
            loss, basis, low = now
            leap = (basis, low) if step is None else (basis + stride * step[0], low + stride * step[1])
            tried = self._round(*leap, rank)
            if tried[0] < loss:
                stride *= 1.5
            else:
                stride, tried = stride / 2, self._round(basis, low, rank)
            step, now = (tried[1] - basis, tried[2] - low), tried
        loss, self.basis, low = now
        return loss, low

    def _round(self, basis: Tensor, low: Tensor, rank: int) -> tuple[float, Tensor, Tensor]:
        u, _, v = torch.linalg.svd(basis, full_matrices=False)
        self.basis, target = u @ v, self.problem.target
        self.solve_basis(self.solve_left(target - low), target - low)
        grouped = self.solve_left(target - low) @ self.expanded()
        low = low_rank(target - grouped, self.problem.metric, rank) if rank else low
        return self.problem.loss(grouped + low), self.basis, low


def low_rank(target: Tensor, metric: Tensor, rank: int) -> Tensor:
    """Nearest of a rank in the metric of the columns."""
    vectors = torch.linalg.eigh((target @ metric @ target.T).double()).eigenvectors[:, -rank:].float()
    return vectors @ (vectors.T @ target)
