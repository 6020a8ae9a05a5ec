"""What every module that stands in for a dense weight has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from tensorfold.algebra.solve import Factors


class FoldedModule(nn.Module, ABC):
    """Cores in place of a dense weight: how other code recognises a folded module, whatever its structure.

    Attributes:
        cores: The factors, in the order of the sites.
        scalars: One number per bond index, where the structure has them.
    """

    cores: nn.ParameterList
    scalars: nn.Parameter | None

    @abstractmethod
    def to_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix, shape (out_features, in_features), multiplied out in ``dtype`` (the cores' own if None)."""

    @abstractmethod
    def load_factors(self, factors: Factors) -> None:
        """Copy a solver's output into the parameters."""
