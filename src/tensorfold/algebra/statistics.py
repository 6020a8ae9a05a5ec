"""Statistics of a matrix on calibration text, and the moments that its fit is weighted by.

Notation:
    W, Ŵ        matrix and its approximation, (out, in); for a table (vocabulary, width)
    C           input moment: mean of x xᵀ over the vectors x that W is applied to, (in, in)
    G           gradient moment: mean of g gᵀ over the loss's gradients g at W's outputs, (out, out)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Chosen for graded tables on a held-out part of a calibration text; see studies/tensorgpt.
COUNT_EXPONENT = 0.75


class Metrics(NamedTuple):
    """Both moments of the error ``‖G^½ (W − Ŵ) C^½‖`` of a fit; None is the identity.

    Attributes:
        input_moment: C, (in, in).
        gradient_moment: G, (out, out), or (out,) for a diagonal one: the weight of every row.
    """

    input_moment: Tensor | None = None
    gradient_moment: Tensor | None = None

    def reordered(self, rows: Tensor | None, columns: Tensor | None) -> Metrics:
        """Moments of ``W[rows][:, columns]``; None leaves a side as it is."""
        c, g = self
        if c is not None and columns is not None:
            c = c[columns.to(c.device)][:, columns.to(c.device)]
        if g is not None and rows is not None:
            g = g[rows.to(g.device)]
            g = g if g.dim() == 1 else g[:, rows.to(g.device)]
        return Metrics(c, g)


def shrunk(moment: Tensor, amount: float) -> Tensor:
    """``(1 − a) C + a · mean(diag C) · I``: a second moment shrunk towards a multiple of the identity.

    What a text of finite length says of rare directions is mostly noise, and another text uses others: shrunk, the
    metric asks a little of all of them (Ledoit & Wolf 2004).

    Args:
        moment: C, shape (n, n).
        amount: a, from 0 (as it is) to 1.
    """
    if not amount:
        return moment
    return (1 - amount) * moment + (amount * moment.diagonal().mean()) * torch.eye(len(moment)).to(moment)


class Means(NamedTuple):
    """Means of a layer with a bias, in fp64, since a bias makes up for differences of large means.

    Attributes:
        given: Mean input of the layer in the folded model, shape (in,).
        wanted: Mean output that the layer should have without its bias, shape (out,).
    """

    given: Tensor
    wanted: Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one matrix W (out, in) on text; each is None where it is not known.

    Args:
        input_moment: C, (in, in); for a table (width, width), from the vectors that the head tied to it reads.
        gradient_moment: G, (out, out); for a table (width, width), from gradients where its rows enter the model.
        counts: How often the text uses each token of a table, (vocabulary,).
        states: Vectors that the head tied to a table reads, (n, width).
        target: Matrix that is folded in W's place, (out, in), where the folded model's own inputs ask for another one.
        start: Cores of a neighbouring problem, where a solver that looks for a local optimum starts.
        means: Means of a layer whose bias makes up for them; ``input_moment`` is then central.
        expert_moments: C of every expert of a tensor, (E, in, in); ``input_moment`` is then their mean by the shares.
        expert_shares: Share of every expert in the vectors that all of them were given, (E,).
    """

    input_moment: Tensor | None = None
    gradient_moment: Tensor | None = None
    counts: Tensor | None = None
    states: Tensor | None = None
    target: Tensor | None = None
    means: Means | None = None
    start: list[Tensor] | None = None
    expert_moments: Tensor | None = None
    expert_shares: Tensor | None = None

    def reordered(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Statistics:
        """Statistics of ``W[rows][:, columns]``, for a linear layer; None leaves a side as it is."""
        c, g = Metrics(self.input_moment, self.gradient_moment).reordered(rows, columns)
        target, means = self.target, self.means
        if target is not None:
            target = target if rows is None else target[rows.to(target.device)]
            target = target if columns is None else target[:, columns.to(target.device)]
        if means is not None:
            given, wanted = means
            given = given if columns is None else given[columns.to(given.device)]
            means = Means(given, wanted if rows is None else wanted[rows.to(wanted.device)])
        return replace(self, input_moment=c, gradient_moment=g, target=target, means=means, start=None)

    @property
    def known(self) -> bool:
        """Whether the text says anything of the matrix."""
        return any(part is not None for part in (self.input_moment, self.gradient_moment, self.counts, self.states))

    def metrics(self, exponent: float = COUNT_EXPONENT) -> Metrics:
        """Moments that a fit of the matrix is weighted by.

        A row of a table enters the model as often as its token is used, and answers for about as many of the model's
        predictions. So its error weighs ``(count + 1)^exponent`` (what the text happens not to use still counts), and
        is measured by what it costs in nats² at either end: where it enters, on gradients, and on the states that a
        tied head reads.

        Args:
            exponent: Power of the counts; only tables have counts.

        Returns:
            C and G; for a table both ends' moments added, (width, width), and row weights of mean 1, (vocabulary,).
        """
        if self.counts is None:
            return Metrics(self.input_moment, self.gradient_moment)
        weights = (self.counts.double() + 1) ** exponent
        ends = [moment.double() for moment in (self.input_moment, self.gradient_moment) if moment is not None]
        return Metrics(sum(ends[1:], ends[0]) if ends else None, weights / weights.mean())

    @property
    def shares(self) -> Tensor | None:
        """Share of each token in the text, shape (vocabulary,), adding up to 1; every token counts once more."""
        return None if self.counts is None else (self.counts.double() + 1) / (self.counts.double() + 1).sum()
