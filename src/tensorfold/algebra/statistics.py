"""What calibration text says of a matrix, and the metrics in which it is then fitted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

# Chosen for graded tables on a held-out part of a calibration text; see studies/tensorgpt.
COUNT_EXPONENT = 0.75


class Metrics(NamedTuple):
    """C and G of the error ``‖G^½ (W − Ŵ) C^½‖`` for W of shape (out, in); None is the identity.

    Attributes:
        inputs: C, (in, in).
        outputs: G, (out, out), or (out,) for a diagonal one: the weight of every row.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None

    def reordered(self, rows: Tensor | None, columns: Tensor | None) -> Metrics:
        """The metrics of ``W[rows][:, columns]``."""
        inputs, outputs = self
        if inputs is not None and columns is not None:
            inputs = inputs[columns.to(inputs.device)][:, columns.to(inputs.device)]
        if outputs is not None and rows is not None:
            outputs = outputs[rows.to(outputs.device)]
            outputs = outputs if outputs.dim() == 1 else outputs[:, rows.to(outputs.device)]
        return Metrics(inputs, outputs)


class Means(NamedTuple):
    """Of a layer with a bias: its mean input, (in,), and what its mean output without the bias should be, (out,);
    fp64, since a bias makes up for differences of large means."""

    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of one matrix W (out, in) from text; nothing where there is none.

    Args:
        inputs: Second moment of the vectors that W is applied to, (in, in); of a table, of those that the head tied to
            it reads.
        gradients: Second moment of the loss's gradient at the outputs, (out, out); of a table, where its rows enter the
            model, (width, width).
        counts: Of a table, how often the text uses each token, (vocabulary,).
        states: Of a table, vectors that the head tied to it reads, (n, width).
        target: What is folded in W's place, (out, in), where the folded model's own inputs ask for another matrix.
        start: Cores of a neighbouring problem, where a solver that looks for a local optimum starts.
        means: Of a layer whose bias makes up for the means; ``inputs`` are then about them.
    """

    inputs: Tensor | None = None
    gradients: Tensor | None = None
    counts: Tensor | None = None
    states: Tensor | None = None
    target: Tensor | None = None
    means: Means | None = None
    start: list[Tensor] | None = None

    def reordered(self, rows: Tensor | None = None, columns: Tensor | None = None) -> Statistics:
        """Of ``W[rows][:, columns]``, for a linear layer."""
        inputs, gradients = Metrics(self.inputs, self.gradients).reordered(rows, columns)
        target, means = self.target, self.means
        if target is not None:
            target = target if rows is None else target[rows.to(target.device)]
            target = target if columns is None else target[:, columns.to(target.device)]
        if means is not None:
            given, wanted = means
            given = given if columns is None else given[columns.to(given.device)]
            means = Means(given, wanted if rows is None else wanted[rows.to(wanted.device)])
        return replace(self, inputs=inputs, gradients=gradients, target=target, means=means, start=None)

    @property
    def known(self) -> bool:
        return any(part is not None for part in (self.inputs, self.gradients, self.counts, self.states))

    def metrics(self, exponent: float = COUNT_EXPONENT) -> Metrics:
        """The metrics of the fit.

        A row of a table enters the model as often as its token is used, and answers for about as many of the model's
        predictions. So its error weighs ``(count + 1)^exponent`` (what the text happens not to use still counts), and
        is measured by what it costs in nats² at either end: where it enters, on gradients, and on the states that a
        tied head reads.
        """
        if self.counts is None:
            return Metrics(self.inputs, self.gradients)
        weights = (self.counts.double() + 1) ** exponent
        ends = [moment.double() for moment in (self.inputs, self.gradients) if moment is not None]
        return Metrics(sum(ends[1:], ends[0]) if ends else None, weights / weights.mean())

    @property
    def shares(self) -> Tensor | None:
        """Of each token in the text, one more counted of each; shape (vocabulary,)."""
        return None if self.counts is None else (self.counts.double() + 1) / (self.counts.double() + 1).sum()
