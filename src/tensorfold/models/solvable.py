"""Weights on their way into a solver."""

from __future__ import annotations

from torch import Tensor, nn

from tensorfold.algebra.precision import solvable
from tensorfold.models.anatomy import dense_weight


def solvable_weight(module: nn.Module) -> Tensor:
    """Weight of a module as (out, in), detached, on the device where it is decomposed; a view of it where it can be."""
    return solvable(dense_weight(module).detach())
