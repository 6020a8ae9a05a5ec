"""All experts of a layer together: a tensor train whose middle mode is the number of the expert."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from torch import Tensor

from tensorfold.algebra.solvers.expert_train import fit_expert_train
from tensorfold.algebra.solvers.solve import Factors
from tensorfold.algebra.specs.expert_train import ExpertTrain
from tensorfold.algebra.statistics import Statistics
from tensorfold.errors import SpecError
from tensorfold.methods.base import NOTHING, Keep, Method
from tensorfold.utils.validation import strict


@strict
class SharedExperts(Method):
    """Tensor train over a layer's experts, ``W_e ≈ U S_e V``: shared bases, and a core for each expert.

    It folds a whole tensor of experts, for ``targets: experts`` or names of such tensors. It has
    ``p·m + E·p·q + q·n`` parameters, less a basis that is the identity.

    Args:
        keep: Fraction of the parameters that stays.
        share: Which basis is shared: that of the ``inputs``, of the ``outputs``, or ``both``, with bonds in proportion
            to the sides; ``states``, the one that experts and the rest of the model have in common.
    """

    name: ClassVar[str] = "shared-experts"
    joins_experts: ClassVar[bool] = True

    keep: Keep
    share: Literal["states", "inputs", "outputs", "both"] = "states"

    def spec(self, out_features: int, in_features: int) -> ExpertTrain:
        raise SpecError(
            "shared-experts: folds all experts of a tensor together; needed targets: experts, or the names of tensors "
            "with several experts."
        )

    def spec_of_experts(self, experts: int, out_features: int, in_features: int, width: int) -> ExpertTrain:
        """Spec for a tensor of experts.

        Args:
            experts: Number of experts.
            out_features: Outputs m of each.
            in_features: Inputs n of each.
            width: Number of features of the states between blocks.

        Raises:
            SpecError: Not even bonds of 1 are within the budget.
        """
        m, n = out_features, in_features
        budget = math.floor(self.keep * experts * m * n)
        share = self.share
        if share == "states":
            share = "inputs" if n == width != m else "outputs" if m == width != n else "both"
        if share == "inputs":
            p, q = m, budget // (experts * m + n)
        elif share == "outputs":
            p, q = budget // (experts * n + m), n
        else:
            squares = m * m + n * n  # bonds s·m and s·n: s² E m n + s (m² + n²) in the budget
            part = (math.sqrt(squares**2 + 4 * experts * m * n * budget) - squares) / (2 * experts * m * n)
            p, q = math.floor(part * m), math.floor(part * n)
        if min(p, q) < 1:
            raise SpecError(
                f"shared-experts: keep={self.keep} leaves no bond for {experts} experts of {m}×{n}; raise it."
            )
        return ExpertTrain(experts, m, n, p, q)

    def solve(self, weight: Tensor, spec: ExpertTrain, known: Statistics = NOTHING) -> Factors:
        weights = weight.unflatten(0, (spec.experts, spec.expert_rows))
        return Factors(fit_expert_train(weights, spec, known.expert_moments, known.expert_shares)[0])
