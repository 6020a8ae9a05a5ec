"""What calibration text says of a matrix, and the metrics in which it is then fitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Chosen for graded tables on a held-out part of a calibration text; see studies/tensorgpt.
COUNT_EXPONENT = 0.75
INPUT_SHARE = 0.06


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


@dataclass(frozen=True, eq=False)
class Statistics:
    """What is known of one matrix W (out, in) from text; nothing where there is none.

    Args:
        inputs: Second moment of the vectors that W is applied to, (in, in); of a table, of those that the head tied to
            it reads.
        gradients: Second moment of the loss's gradient at the outputs, (out, out).
        counts: Of a table, how often the text uses each token, (vocabulary,).
        states: Of a table, vectors that the head tied to it reads, (n, width).
    """

    inputs: Tensor | None = None
    gradients: Tensor | None = None
    counts: Tensor | None = None
    states: Tensor | None = None

    @property
    def known(self) -> bool:
        return any(part is not None for part in (self.inputs, self.gradients, self.counts, self.states))

    def metrics(self, exponent: float = COUNT_EXPONENT, input_share: float = INPUT_SHARE) -> Metrics:
        """The metrics of the fit.

        A row of a table enters the model as often as its token is used, and answers for about as many of the model's
        predictions: its error weighs ``(count + 1)^exponent`` (what the text happens not to use still counts) and is
        measured on what a tied head reads, beside ``input_share`` of its plain square for where it enters.
        """
        if self.counts is None:
            return Metrics(self.inputs, self.gradients)
        weights = (self.counts.double() + 1) ** exponent
        inputs = self.inputs
        if inputs is not None:
            shares = input_share * torch.eye(len(inputs), dtype=torch.float64) / len(inputs)
            inputs = inputs.double().cpu() / max(float(inputs.trace()), torch.finfo(torch.float64).tiny) + shares
        return Metrics(inputs, weights / weights.mean())
